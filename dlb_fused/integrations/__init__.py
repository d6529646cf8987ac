"""What the frameworks need beyond the two lines of a plain loop. Import the module by its name::

    from dlb_fused.integrations.accelerate import overlap_loader
    from dlb_fused.integrations.lightning import DLBCallback
    from dlb_fused.integrations.transformers import DLBTrainer

`import dlb_fused` imports none of them.
"""
