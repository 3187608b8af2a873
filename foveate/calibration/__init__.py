"""Search what a method needs to know of a model: VFlowOpt's numbers, YOPO's heads."""
