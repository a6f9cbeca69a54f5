"""``loomvideo pretrain``, ``finetune-edit`` and ``plan``."""
