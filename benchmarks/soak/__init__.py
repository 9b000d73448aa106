"""Mixed traffic on a real engine while its monitor meets one fault after the other."""
