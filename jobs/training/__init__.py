"""``loomvideo pretrain``, ``finetune-edit``, ``plan`` and ``audit-resume``."""
