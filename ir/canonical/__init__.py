"""One canonical graph form for passes, made right after tracing."""
