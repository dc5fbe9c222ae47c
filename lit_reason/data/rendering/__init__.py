"""From conversations to token rows by the model's own chat template, and the contract that template must keep."""
