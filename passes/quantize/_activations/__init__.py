"""Parts shared by passes that change activations."""
