"""Where the policy replicas are, while a run goes on: lists, DNS names, Kubernetes EndpointSlices.

`address` reads what a setting says, `ports` is the seam: a stream of complete answers. `static`, `dns` and
`endpoint_slices` are its kinds (`slices` decides which endpoints count, `cluster` talks to the API server), `union`
makes one stream of several.
"""
