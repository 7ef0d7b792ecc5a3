"""What runs a plan: the module that users hold, its captured calls, schedule, state and history."""
