"""Publishing on the Hub: model card and upload."""
