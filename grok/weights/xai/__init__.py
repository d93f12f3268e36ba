"""xAI's release of Grok-1 (`ckpt-0`), parsed and never unpickled."""
