"""Training jobs as objects of Kubernetes, for whoever makes them: the trainer service, or the command from outside.

    settings.py   what the pods of a cluster look like      objects.py   the objects of a workload, a pure function
    explain.py    what objects and refusals mean            api.py       the API server
    problem.py    a request that failed

Only `api` imports the package `kubernetes`; nothing here imports torch.
"""
