"""Workers as workloads of Kubernetes, one a launch. Their objects, and what those mean, are `steersman.cluster`'s."""
