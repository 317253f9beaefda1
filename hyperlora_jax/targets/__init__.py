"""LoRA-target datasets: records, writer, reader, gauge, statistics, import, inspection."""
