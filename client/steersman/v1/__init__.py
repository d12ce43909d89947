"""Generated stubs of the contract in protos/steersman/v1. Never edited by hand."""
