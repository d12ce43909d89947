"""Workers as Kubernetes Jobs, one a launch.

    settings.py   what the pods of this cluster look like       manifest.py   the Job of a run folder, a pure function
    launcher.py   the `Launcher`                                explain.py    what Jobs, pods and refusals mean
    cluster.py    the API server

Only `cluster` imports the package `kubernetes`.
"""
