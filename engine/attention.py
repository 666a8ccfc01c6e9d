"""Attention of new tokens to held ones, without copies of keys and values.

Infrastructure: skip it on a first reading.

In Qwen2.5-7B seven query heads share a head of keys and values. Where there is a mask, transformers
copies both for each of the seven. Here a shared head gets seven times as many queries instead.
"""

from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_shared"


def use(model):
    """Let the layers of a model that attends by "sdpa" call `attend`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(module, query, key, value, mask, scaling=None, **kwargs):
    """The "sdpa" of transformers; the same where the queries are few.

    query [B, heads, n, d], key and value [B, shared heads, keys, d], mask [B, 1, n, keys] or None
    -> ([B, n, heads, d], None). The mask is repeated, which must take less than the copies would.
    """
    _, heads, n, d = query.shape
    sharing = heads // key.shape[1]
    # With one query transformers does the same.
    if mask is None or n == 1 or sharing * n >= min(key.shape[2], heads * d):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    together = query.unflatten(1, (-1, sharing)).flatten(2, 3)  # [B, shared heads, sharing * n, d]
    mask = mask.repeat(1, 1, sharing, 1)
    out = scaled_dot_product_attention(together, key, value, mask, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2), None
