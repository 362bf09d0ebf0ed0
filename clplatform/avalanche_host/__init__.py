"""What runs Avalanche's plugins inside the Learner. Importing a module of this package loads Avalanche (seconds).

| file | what |
|---|---|
| `host.py` | the order in which hooks are called, from the doors of a strategy of ours |
| `facade.py`, `model.py` | the objects that plugins see as the strategy and as its model |
| `data.py` | our batches, data and experiences in their shapes, and their data loaders in ours |
| `plugins.py`, `generator.py` | plugins from YAML nodes or short names; a generator for generative replay |
| `state.py`, `encode.py`, `decode.py` | what plugins hold as tensors and plain values, and back |
| `keepsake.py` | what plugins do to predictions, saved with the model |
"""
