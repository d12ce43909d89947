"""One stage on several processes: who they are, what they tell each other, and models that are sharded over them.

The trainer of one process imports none of torch.distributed: it uses `world.SOLO`. Nothing that ranks exchange is
pickled: they send tensors, and JSON.
"""
