"""A local page that follows runs live: reads run histories, never writes, never imports torch.

queries: history -> plain data; news: what came since; guard: who may ask; app: addresses; serve: the server.
"""
