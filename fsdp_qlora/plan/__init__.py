"""What a run needs of memory and time, and the settings that make it fit."""
