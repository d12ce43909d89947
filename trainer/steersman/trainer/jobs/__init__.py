"""TrainerService: jobs as processes of their own, their state in embedded SQLite.

    servicer.py   protobuf to dataclasses and back         handler.py   what each method does
    store.py      jobs and their events, the only truth    launcher.py  how a worker process is started
    monitor.py    notices workers that died                worker.py    the process that runs one stage

The service holds no job state in memory: it may stop at any time, and its successor finds everything in the store.
"""
