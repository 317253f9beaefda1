"""Many LoRAs at once on one frozen base."""
