"""Callbacks for training frameworks: one file each, which imports its framework and no other.

Each announces epochs (``net.set_epoch``), sends the alignment of every layer to the framework's
own loggers, and keeps the learning state (``net.feedback_state_dict()``) in its checkpoints:

- ``grapefx.integrations.lightning``: a Lightning ``Callback``
- ``grapefx.integrations.huggingface``: a Hugging Face ``TrainerCallback``
- ``grapefx.integrations.accelerate``: for loops that use an ``Accelerator``
"""
