"""Super-resolution and restoration networks of spandrel, kornia's features."""

from __future__ import annotations

from typing import Any

from conformance.users.catalog import enter, image
from conformance.zoo import Field, floats, published

FAMILY = "super-resolution"


def spandrel(
    name: str, module: str, size: int = 32, channels: int = 3, field: str = "x", **settings: Any
) -> None:
    folder, _, kind = name.partition(".")
    make = published(f"spandrel.architectures.{folder}.__arch.{module}", kind or folder, **settings)
    enter(f"spandrel.{kind or folder}", FAMILY, make, image(size, channels, field))


spandrel("Compact.SRVGGNetCompact", "SRVGG", num_feat=32, num_conv=4)
spandrel("ESRGAN.RRDBNet", "RRDB", num_filters=16, num_blocks=2)
spandrel("RCAN", "rcan_arch", n_resgroups=2, n_resblocks=2, n_feats=32)
spandrel("SPAN", "span", num_in_ch=3, num_out_ch=3)
spandrel("SAFMN", "safmn", dim=36, n_blocks=2)
spandrel("SAFMNBCIE.SAFMN_BCIE", "safmn_bcie", dim=36, n_blocks=2, num_layers=2)
spandrel("PLKSR", "PLKSR", n_blocks=3)
spandrel("PLKSR.RealPLKSR", "RealPLKSR", n_blocks=3, dysample=True)
spandrel("OmniSR", "OmniSR", res_num=1, num_feat=32)
spandrel(
    "SwinIR",
    "SwinIR",
    depths=(2,),
    num_heads=(2,),
    embed_dim=32,
    window_size=8,
    img_size=32,
    upscale=2,
    upsampler="pixelshuffle",
)
spandrel(
    "Swin2SR",
    "Swin2SR",
    depths=(2,),
    num_heads=(2,),
    embed_dim=32,
    window_size=8,
    img_size=32,
    upscale=2,
    upsampler="pixelshuffle",
)
spandrel(
    "HAT",
    "HAT",
    depths=(2,),
    num_heads=(2,),
    embed_dim=32,
    window_size=8,
    img_size=32,
    upscale=2,
    upsampler="pixelshuffle",
    squeeze_factor=4,
)
spandrel("DAT", "DAT", depth=[2], num_heads=[2], embed_dim=32, split_size=[4, 8], img_size=32)
spandrel(
    "ATD",
    "atd_arch",
    depths=(2,),
    num_heads=(2,),
    embed_dim=32,
    category_size=32,
    num_tokens=16,
    img_size=32,
    upscale=2,
    upsampler="pixelshuffle",
)
spandrel(
    "DRCT",
    "drct_arch",
    depths=(2,),
    num_heads=(2,),
    embed_dim=32,
    window_size=8,
    img_size=32,
    gc=8,
    upscale=2,
    upsampler="pixelshuffle",
)
spandrel("RGT", "rgt", depth=[2], num_heads=[2], embed_dim=32, img_size=32)
spandrel("CRAFT", "CRAFT", depths=[1], num_heads=[6])
spandrel("DCTLSA", "dctlsa", nf=20, field="input")
spandrel("DITN.DITN_Real", "DITN_Real", ITL_blocks=1, SAL_blocks=1, dim=32, field="inp_img")
spandrel("FDAT", "fdat", embed_dim=32, num_groups=1, depth_per_group=2)
spandrel("MoESR", "MoESR", n_blocks=2, n_block=2, dim=32)
spandrel("MoSR", "mosr_arch", n_block=2, dim=32)
spandrel("SwiftSRGAN.Generator", "SwiftSRGAN", num_channels=16, num_blocks=2)
spandrel("RealCUGAN.UpCunet2x", "upcunet_v3", 64)
spandrel(
    "MMRealSR.MMRRDBNet_test",
    "mmrealsr_arch",
    64,
    num_in_ch=3,
    num_out_ch=3,
    num_feat=16,
    num_block=1,
    num_grow_ch=8,
    num_feats=[8, 16, 16, 16],
    num_blocks=[1, 1, 1, 1],
)
spandrel("DnCNN", "network_dncnn", 32, 1, nb=5, nc=32)
spandrel("DRUNet", "network_unet", 32, 2, in_nc=2, nc=[8, 16, 16, 32], nb=1, field="x0")
spandrel("NAFNet", "NAFNet_arch", width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1], field="inp")
spandrel(
    "KBNet.KBNet_s",
    "kbnet_s",
    width=16,
    middle_blk_num=1,
    enc_blk_nums=[1, 1],
    dec_blk_nums=[1, 1],
    field="inp",
)
spandrel("SCUNet", "SCUNet", 64, config=[2, 2, 2, 2, 2, 2, 2], dim=64, field="x0")
spandrel(
    "FFTformer",
    "fftformer_arch",
    num_blocks=[1, 1, 1],
    num_refinement_blocks=1,
    dim=16,
    field="inp_img",
)
spandrel("Uformer", "Uformer", 64, img_size=64, embed_dim=16, depths=[1] * 9)
spandrel("RetinexFormer", "retinexformer_arch", stage=1, n_feat=20)
spandrel("MixDehazeNet", "MixDehazeNet", 64, embed_dims=[8, 16, 32, 16, 8], depths=[1, 1, 1, 1, 1])
spandrel("HVICIDNet.CIDNet", "cidnet")
spandrel(
    "GRL",
    "grl",
    img_size=32,
    embed_dim=32,
    depths=[2],
    num_heads_window=[2],
    num_heads_stripe=[2],
    upscale=2,
    upsampler="pixelshuffle",
)

enter(
    "spandrel.LaMa",
    "inpainting",
    published("spandrel.architectures.LaMa.__arch.LaMa", "LaMa", in_nc=4),
    {"img": floats("batch", 3, 64, 64), "mask": floats("batch", 1, 64, 64)},
)
FBCNN = published("spandrel.architectures.FBCNN.__arch.FBCNN", "FBCNN", nb=1)
enter("spandrel.FBCNN", "restoration", FBCNN, image(32))

PATCH: dict[str, Field] = {"input": floats("batch", 1, 32, 32)}
enter("kornia.HardNet", "features", published("kornia.feature", "HardNet", pretrained=False), PATCH)
enter("kornia.SOSNet", "features", published("kornia.feature", "SOSNet", pretrained=False), PATCH)
enter(
    "kornia.HyNet",
    "features",
    published("kornia.feature", "HyNet", pretrained=False),
    {"x": floats("batch", 1, 32, 32)},
)
enter("kornia.TFeat", "features", published("kornia.feature", "TFeat", pretrained=False), PATCH)
KEYNET = published("kornia.feature", "KeyNet", pretrained=False)
enter("kornia.KeyNet", "features", KEYNET, image(64, 1))
XFEAT = published("kornia.feature", "XFeatModel")
enter("kornia.XFeat", "features", XFEAT, image(64, 1))
DEFMO = published("kornia.feature", "DeFMO", pretrained=False)
enter("kornia.DeFMO", "restoration", DEFMO, {"input_data": floats("batch", 6, 64, 64)})
