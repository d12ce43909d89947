"""The main job, twice: a small model aligned from scratch by four gRPC services."""
