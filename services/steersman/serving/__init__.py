"""What every server shares: settings, bootstrap, health, metrics, logs, error translation, draining, batching."""
