"""The part of a converted model's configuration that all families share. Copied into every checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .layout_uniattn import FORMAT_VERSION, AttentionShape, Layout

if TYPE_CHECKING:
    # The mixin stands before a family's own configuration.
    from transformers import PreTrainedConfig as _Config
else:
    _Config = object

# Layer types of changed layers start with this on disk; a stock configuration class refuses such names.
LAYER_TYPE_PREFIX = "uniattn_"
# Families whose full layers know no positions where there are sliding ones.
WITHOUT_POSITIONS = ("cohere2", "exaone4")


def attention_shape(config) -> AttentionShape:
    """The sizes of a decoder's configuration that decide which layouts it can have.

    Layers get the same mask type only if mask, window and rotary embedding agree, so that they can share maps.
    """
    layers = config.num_hidden_layers
    types = list(getattr(config, "layer_types", None) or [])
    if not types:
        types = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * layers
    rotary = getattr(config, "no_rope_layers", None)
    if not rotary and config.model_type.removeprefix("uniattn_") in WITHOUT_POSITIONS and config.sliding_window:
        rotary = [name != "full_attention" for name in types]
    if rotary:
        types = [name if used else f"{name}/no_rope" for name, used in zip(types, rotary, strict=True)]
    query_heads = config.num_attention_heads
    return AttentionShape(
        query_heads=query_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // query_heads,
        hidden_size=config.hidden_size,
        mask_types=tuple(types),
    )


def layer_windows(config) -> tuple[int | None, ...]:
    """For each layer the number of keys that a query sees at most; None where it sees all."""
    window = getattr(config, "sliding_window", None)
    types = attention_shape(config).mask_types
    return tuple(window if name.startswith("sliding_attention") else None for name in types)


def layout_of(config) -> Layout:
    """The layout of a converted model's configuration; of any other, that of stock layers."""
    return getattr(config, "layout", None) or Layout.own(config.num_hidden_layers)


class UniAttnConfigMixin(_Config):
    """Adds the field `uniattn` to a family's configuration class.

    `uniattn` holds `format_version`, `layers` (one mapping per layer, see `layout_uniattn.LayerPlan`) and
    `stock_layer_types`. On disk the types of changed layers are replaced by names such as `uniattn_softmax`: a stock
    class that is asked to load the directory then stops with an error instead of inventing the missing projections.
    """

    if TYPE_CHECKING:
        # Declared by each family, so that it is a field of the dataclass.
        uniattn: dict | None
        layer_types: Any

    def __post_init__(self, **kwargs):
        stored = kwargs.get("layer_types", getattr(self, "layer_types", None))
        if stored and any(str(name).startswith(LAYER_TYPE_PREFIX) for name in stored):
            kwargs.pop("layer_types", None)
            original = (self.uniattn or {}).get("stock_layer_types")
            if "layer_types" in type(self).__dataclass_fields__:
                self.layer_types = original
            elif original is not None:
                kwargs["layer_types"] = original
        super().__post_init__(**kwargs)

    @property
    def layout(self) -> Layout:
        """The layout; without a `uniattn` field every layer is the stock layer."""
        if not self.uniattn:
            return Layout.own(self.num_hidden_layers)
        return Layout.from_list(self.uniattn["layers"])

    def set_layout(self, layout: Layout) -> None:
        """Stores a layout.

        Raises:
            ValueError: the layout is not legal for this model.
        """
        stock_types = getattr(self, "layer_types", None)
        self.uniattn = {
            "format_version": layout.format_version,
            "layers": layout.to_list(),
            "stock_layer_types": list(stock_types) if stock_types else None,
        }
        self.validate_uniattn()
        # What engines read of layers that differ; our own code asks the layout, and the global number is the base's.
        heads: dict[int | str, dict[str, Any]] = {
            index: {"num_key_value_heads": plan.kv_heads} for index, plan in enumerate(layout) if plan.kv_heads
        }
        if heads:
            self.allow_global_per_layer_attribute_access = True
        self.per_layer_config = heads or None

    def validate_uniattn(self) -> None:
        """Called by transformers on construction. Raises ValueError for a newer format or an illegal layout."""
        if not self.uniattn:
            return
        version = self.uniattn.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has uniattn format {version}, this code reads up to {FORMAT_VERSION}: "
                "load it with trust_remote_code=True or update uniattn"
            )
        problems = self.layout.problems(attention_shape(self))
        if problems:
            raise ValueError("illegal uniattn layout: " + "; ".join(problems))

    def to_dict(self) -> dict:
        output = super().to_dict()
        # All three, whichever class is saved: engines ask for AutoModel, tools for AutoModelForCausalLM.
        module, prefix = type(self).__module__.split(".")[-1], type(self).__name__.removesuffix("Config")
        output["auto_map"] = {
            "AutoConfig": f"{module}.{prefix}Config",
            "AutoModel": f"{module}.{prefix}Model",
            "AutoModelForCausalLM": f"{module}.{prefix}ForCausalLM",
        }
        if self.uniattn:
            stock = self.uniattn.get("stock_layer_types") or ["full_attention"] * self.num_hidden_layers
            plans = self.layout.plans
            if any(plan.kind != "own" for plan in plans):
                output["layer_types"] = [
                    name if plan.kind == "own" else LAYER_TYPE_PREFIX + plan.kind
                    for name, plan in zip(stock, plans, strict=True)
                ]
        return output
