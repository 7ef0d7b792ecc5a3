"""Layer-parallel training: stages on the processes of a group (``docs/distributed.md``)."""
