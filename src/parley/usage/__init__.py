"""What models cost. Everything above calls models through this module, so that no call goes uncounted."""
