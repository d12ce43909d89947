"""What a kubelet says of pods, and words that must be in what is said of it: against our API server and a real one."""

from typing import Any

PENDING: list[tuple[dict[str, Any], list[str]]] = [
    *(
        (
            {
                "phase": "Pending",
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
                ],
            },
            [message, "kubernetes.run_claim"],
        )
        for message in (
            '0/1 nodes are available: persistentvolumeclaim "runs" not found.',
            "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims.",
        )
    ),
    (
        {
            "phase": "Pending",
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                }
            ],
        },
        ["Unschedulable", "Insufficient nvidia.com/gpu", "kubernetes.node_selector"],
    ),
    (
        {
            "phase": "Pending",
            "containerStatuses": [
                {
                    "name": "worker",
                    "state": {
                        "waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "trainer:1"'}
                    },
                }
            ],
        },
        ["ImagePullBackOff", "trainer:1", "kubernetes.image_pull_secrets"],
    ),
    (
        {
            "phase": "Pending",
            "containerStatuses": [
                {
                    "name": "worker",
                    "state": {
                        "waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hub-token" not found'}
                    },
                }
            ],
        },
        ['secret "hub-token" not found', "create the Secret", "kubernetes.env_from_secrets"],
    ),
    *(
        (
            {"containerStatuses": [{"name": "worker", "state": {"waiting": {"reason": reason, "message": "no"}}}]},
            [f"{reason}: no", advice],
        )
        for reason, advice in (
            ("ErrImagePull", "kubernetes.image_pull_secrets"),
            ("ErrImageNeverPull", "kubernetes.image_pull_policy"),
            ("InvalidImageName", "kubernetes.image"),
        )
    ),
]

# How the container ended.
ENDINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"exitCode": 137, "reason": "OOMKilled"}, ["memory limit", "resources.memory_bytes_per_process"]),
    (
        {"exitCode": 1, "reason": "Error", "message": "ModuleNotFoundError: steersman"},
        ["status 1", "ModuleNotFound"],
    ),
    ({"exitCode": 139, "reason": "Error"}, ["signal 11"]),
]
