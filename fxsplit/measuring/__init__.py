"""What operations, phases and runs take: seconds, bytes and joules."""
