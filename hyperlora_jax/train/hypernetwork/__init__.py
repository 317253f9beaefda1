"""What `hyperlora train` trains: data, objectives, task, and the VAE of LoRAs."""
