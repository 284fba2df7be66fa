"""What the page says, in English and Chinese; the browser's language decides."""

LABELS = {  # by key: English, Chinese
    "title": ("# Fill a hole in a picture", "# 修补图片"),
    "model": (
        "The model {file} knows {subject}, {size} pixels wide. For other pictures, start the page "
        "with another model: see README.md.",
        "模型 {file} 学过：{subject}（{size} 像素）。其他类型的图片请换用别的模型启动本页，"
        "见 README.md。",
    ),
    "more": ("More", "更多"),
    "hole": ("What is replaced", "替换的部分"),
    "painted": ("what I paint", "涂抹的部分"),
    "uploaded": ("the hole of a mask file", "掩码文件中的空洞"),
    "thin": ("thin strokes (thin)", "细线条 (thin)"),
    "thick": ("thick strokes and boxes (thick)", "粗线条和方块 (thick)"),
    "ev2li": ("every second line (ev2li)", "隔行 (ev2li)"),
    "nn2": ("three of four pixels (nn2)", "每四个像素中的三个 (nn2)"),
    "ex64": ("all but the middle (ex64)", "除中间以外 (ex64)"),
    "genhalf": ("the right half (genhalf)", "右半边 (genhalf)"),
    "mask": ("Mask file", "掩码文件"),
    "mask_hole": ("In the mask file, the hole is", "掩码文件中的空洞是"),
    "black": ("black", "黑色"),
    "alpha": ("transparent", "透明"),
    "color": ("coloured", "彩色"),
    "method": ("Method", "方法"),
    "fast": ("fast: DDNM, {fast} steps", "快速：DDNM，{fast} 步"),
    "repaint": ("as in the paper: RePaint, {repaint} steps", "按论文：RePaint，{repaint} 步"),
    "samples": ("Results", "结果数量"),
    "seed": ("Seed (empty: a new one each time)", "随机种子（留空则每次不同）"),
    "full_size": ("Keep the photo's own size", "保持照片原有尺寸"),
    "mask_grow": ("Enlarge the hole (pixels)", "将空洞向外扩大（像素）"),
    "run": ("Run", "运行"),
    "cancel": ("Cancel", "取消"),
    "files": (
        "Downloads. repeat.yml makes the same result again with test.py",
        "下载。用 test.py 运行 repeat.yml 可重现结果",
    ),
}
MESSAGES = {
    "starting": ("Starting", "正在开始"),
    "waiting": ("{count} before you", "前面还有 {count} 个任务"),
    "loading": ("Loading the network: {seconds} s", "正在加载网络：{seconds} 秒"),
    "preparing": ("Reading the picture: {seconds} s", "正在读取图片：{seconds} 秒"),
    "running": (
        "Step {calls} of {total}, {left} s left",
        "第 {calls} / {total} 步，剩余 {left} 秒",
    ),
    "writing": ("Writing the result", "正在写入结果"),
    "done": ("Done in {seconds} s · seed {seed}", "完成，用时 {seconds} 秒 · 种子 {seed}"),
    "cancelled": ("Cancelled at step {calls} of {total}", "已取消（第 {calls} / {total} 步）"),
    "cancelled early": ("Cancelled before the first step", "已在第一步之前取消"),
    "nothing runs": ("Nothing runs that could be cancelled", "没有可取消的任务"),
    "no picture": ("Choose a picture first", "请先选择图片"),
    "no mask": ("Choose a mask file first", "请先选择掩码文件"),
    "nothing painted": ("Paint over what is to be replaced", "请先涂抹要替换的部分"),
    "queue full": ("Too many are waiting: try again later", "排队人数过多，请稍后再试"),
    "fault": ("The program failed: see its terminal", "程序出错，详情见终端"),
}
EDITOR_WORDS = {
    "drop": (
        "Drop a picture here, paste one, or tap to choose one",
        "拖入或粘贴图片，或点按选择图片",
    ),
    "examples": ("Or take an example:", "或使用示例："),
    "rule": ("Paint over what is to be replaced.", "涂抹要替换的部分。"),
    "brush": ("Brush", "画笔"),
    "eraser": ("Eraser", "橡皮"),
    "size": ("Size", "大小"),
    "undo": ("Undo", "撤销"),
    "clear": ("Clear", "清除"),
    "other": ("Other picture", "换一张"),
    "compare": ("Before and after", "修复前后"),
    "hold": ("Hold: original", "按住看原图"),
    "go_on": ("Go on with this result", "在此结果上继续"),
    "back": ("Back to the hole", "返回涂抹"),
    "uploading": ("Uploading {name}, {size} MB …", "正在上传 {name}（{size} MB）…"),
    "reading": ("Reading the picture …", "正在读取图片…"),
    "too_large": ("{name} has {size} MB, and at most {most} MB can be uploaded",
                  "{name} 有 {size} MB，最多可上传 {most} MB"),
    "failed": ("{name} could not be uploaded; try again", "{name} 上传失败，请重试"),
}  # fmt: skip
# What published networks were trained on, by a part of the file's name; the first that fits counts.
SUBJECTS = {
    "demo64": ("drawn faces", "手绘人脸"),
    "celeba": ("photos of faces", "人脸照片"),
    "places": ("photos of places", "场景照片"),
    "bedroom": ("photos of bedrooms", "卧室照片"),
    "church": ("photos of churches", "教堂照片"),
    "cat": ("photos of cats", "猫的照片"),
    "horse": ("photos of horses", "马的照片"),
    "_diffusion": ("photos of things and animals (ImageNet)", "物品和动物照片 (ImageNet)"),
    "": ("what it was trained on", "其训练图片"),
}


def language(accepted: str | None) -> int:
    """Return the place of a visitor's language in the tuples, from the Accept-Language header."""
    return int((accepted or "").lower().startswith("zh"))
