"""Methods in other libraries' training loops: callbacks for Hugging Face's ``Trainer`` and for Lightning.

accelerate needs none: make the method from what ``accelerator.prepare`` gave, and hand it to
``accelerator.register_for_checkpointing``.
"""
