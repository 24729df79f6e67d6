"""qwen-ray: fine-tune a Qwen model where it is weak, and prove that nothing else got worse."""

__version__ = "0.1.0"
