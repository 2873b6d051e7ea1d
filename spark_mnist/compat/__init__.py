"""What older packages ask of current ones. Runs on: driver, rank."""
