"""Making a trained model smaller, and measuring what that costs."""
