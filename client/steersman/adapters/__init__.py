"""Drop-in callables that put Steersman's reward service behind other trainers, one module each."""
