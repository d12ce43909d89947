"""Generated stubs of protos/steersman/v1. Never edited by hand."""
