"""Generated stubs of protos/steersman/reward/compat. Never edited by hand."""
