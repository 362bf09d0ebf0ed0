"""What runs Avalanche's plugins inside the Learner. Importing a module of this package loads Avalanche (seconds).

| file | what |
|---|---|
| `host.py` | the object that plugins see as the strategy, and the order in which their hooks are called |
| `model.py` | the object that they see as the model |
| `data.py` | our batches, data and experiences in their shapes, and their data loaders in ours |
| `plugins.py` | plugins from YAML nodes or short names |
| `state.py` | what plugins have in their attributes as tensors and plain values, and back |
"""
