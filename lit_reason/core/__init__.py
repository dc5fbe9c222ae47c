"""What every training regime inherits: model building, optimizer, normalisation, evaluation."""
