"""The small world that Pagoda mini knows: tables of facts, words and names, in English and Chinese. Data only.

A relation is rows of named columns with ways to ask and one way to answer; its inverse is simply another relation over
the same rows. Answers are unique for the columns asked about, so that they can be right or wrong.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """`asks` and `reply` are format strings over `columns`; `language` is "en" or "zh"."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    asks: tuple[str, ...]
    reply: str
    language: str = "en"


def table(text: str, separator: str = " ") -> tuple[tuple[str, ...], ...]:
    """Rows end with `;`, columns with `separator`; an underscore stands for a space inside a name."""
    rows = (row.strip().split(separator) for row in " ".join(text.split()).split(";") if row.strip())
    return tuple(tuple(cell.replace("_", " ") for cell in row) for row in rows)


COUNTRIES = table("""
France Paris Europe 法国 巴黎 欧洲; Germany Berlin Europe 德国 柏林 欧洲; Italy Rome Europe 意大利 罗马 欧洲;
Spain Madrid Europe 西班牙 马德里 欧洲; Portugal Lisbon Europe 葡萄牙 里斯本 欧洲; Austria Vienna Europe 奥地利 维也纳 欧洲;
Poland Warsaw Europe 波兰 华沙 欧洲; Greece Athens Europe 希腊 雅典 欧洲; Sweden Stockholm Europe 瑞典 斯德哥尔摩 欧洲;
Norway Oslo Europe 挪威 奥斯陆 欧洲; Finland Helsinki Europe 芬兰 赫尔辛基 欧洲; Denmark Copenhagen Europe 丹麦 哥本哈根 欧洲;
Ireland Dublin Europe 爱尔兰 都柏林 欧洲; Iceland Reykjavik Europe 冰岛 雷克雅未克 欧洲; Hungary Budapest Europe 匈牙利 布达佩斯 欧洲;
Belgium Brussels Europe 比利时 布鲁塞尔 欧洲; Romania Bucharest Europe 罗马尼亚 布加勒斯特 欧洲; Croatia Zagreb Europe 克罗地亚 萨格勒布 欧洲;
Switzerland Bern Europe 瑞士 伯尔尼 欧洲; Ukraine Kyiv Europe 乌克兰 基辅 欧洲; Russia Moscow Europe 俄罗斯 莫斯科 欧洲;
China Beijing Asia 中国 北京 亚洲; Japan Tokyo Asia 日本 东京 亚洲; India New_Delhi Asia 印度 新德里 亚洲;
South_Korea Seoul Asia 韩国 首尔 亚洲; Thailand Bangkok Asia 泰国 曼谷 亚洲; Vietnam Hanoi Asia 越南 河内 亚洲;
Nepal Kathmandu Asia 尼泊尔 加德满都 亚洲; Mongolia Ulaanbaatar Asia 蒙古 乌兰巴托 亚洲; Indonesia Jakarta Asia 印度尼西亚 雅加达 亚洲;
Pakistan Islamabad Asia 巴基斯坦 伊斯兰堡 亚洲; Iran Tehran Asia 伊朗 德黑兰 亚洲; Iraq Baghdad Asia 伊拉克 巴格达 亚洲;
Turkey Ankara Asia 土耳其 安卡拉 亚洲; Malaysia Kuala_Lumpur Asia 马来西亚 吉隆坡 亚洲; Cambodia Phnom_Penh Asia 柬埔寨 金边 亚洲;
Egypt Cairo Africa 埃及 开罗 非洲; Kenya Nairobi Africa 肯尼亚 内罗毕 非洲; Morocco Rabat Africa 摩洛哥 拉巴特 非洲;
Ghana Accra Africa 加纳 阿克拉 非洲; Nigeria Abuja Africa 尼日利亚 阿布贾 非洲; Ethiopia Addis_Ababa Africa 埃塞俄比亚 亚的斯亚贝巴 非洲;
Senegal Dakar Africa 塞内加尔 达喀尔 非洲; Uganda Kampala Africa 乌干达 坎帕拉 非洲; Tunisia Tunis Africa 突尼斯 突尼斯城 非洲;
Canada Ottawa North_America 加拿大 渥太华 北美洲; Mexico Mexico_City North_America 墨西哥 墨西哥城 北美洲;
Cuba Havana North_America 古巴 哈瓦那 北美洲; Jamaica Kingston North_America 牙买加 金斯敦 北美洲;
Brazil Brasilia South_America 巴西 巴西利亚 南美洲; Argentina Buenos_Aires South_America 阿根廷 布宜诺斯艾利斯 南美洲;
Chile Santiago South_America 智利 圣地亚哥 南美洲; Peru Lima South_America 秘鲁 利马 南美洲;
Colombia Bogota South_America 哥伦比亚 波哥大 南美洲; Uruguay Montevideo South_America 乌拉圭 蒙得维的亚 南美洲;
Ecuador Quito South_America 厄瓜多尔 基多 南美洲; Australia Canberra Oceania 澳大利亚 堪培拉 大洋洲;
New_Zealand Wellington Oceania 新西兰 惠灵顿 大洋洲; Fiji Suva Oceania 斐济 苏瓦 大洋洲
""")
COUNTRY_COLUMNS = ("country", "capital", "continent", "国", "都", "洲")

ELEMENTS = table("""
hydrogen H 1 氢; helium He 2 氦; lithium Li 3 锂; beryllium Be 4 铍; boron B 5 硼; carbon C 6 碳; nitrogen N 7 氮; oxygen O 8 氧;
fluorine F 9 氟; neon Ne 10 氖; sodium Na 11 钠; magnesium Mg 12 镁; aluminium Al 13 铝; silicon Si 14 硅; phosphorus P 15 磷;
sulfur S 16 硫; chlorine Cl 17 氯; argon Ar 18 氩; potassium K 19 钾; calcium Ca 20 钙; titanium Ti 22 钛; chromium Cr 24 铬;
iron Fe 26 铁; cobalt Co 27 钴; nickel Ni 28 镍; copper Cu 29 铜; zinc Zn 30 锌; silver Ag 47 银; tin Sn 50 锡; iodine I 53 碘;
tungsten W 74 钨; platinum Pt 78 铂; gold Au 79 金; mercury Hg 80 汞; lead Pb 82 铅; uranium U 92 铀
""")

ANIMALS = table("""
dog puppy 4 mammal 狗; cat kitten 4 mammal 猫; cow calf 4 mammal 牛; horse foal 4 mammal 马; sheep lamb 4 mammal 绵羊;
goat kid 4 mammal 山羊; pig piglet 4 mammal 猪; bear cub 4 mammal 熊; deer fawn 4 mammal 鹿; kangaroo joey 2 mammal 袋鼠;
duck duckling 2 bird 鸭子; goose gosling 2 bird 鹅; hen chick 2 bird 母鸡; eagle eaglet 2 bird 鹰; owl owlet 2 bird 猫头鹰;
swan cygnet 2 bird 天鹅; frog tadpole 4 amphibian 青蛙; spider spiderling 8 arachnid 蜘蛛; butterfly caterpillar 6 insect 蝴蝶;
bee larva 6 insect 蜜蜂
""")

PLANETS = table("""
Mercury first 水星 一; Venus second 金星 二; Earth third 地球 三; Mars fourth 火星 四; Jupiter fifth 木星 五;
Saturn sixth 土星 六; Uranus seventh 天王星 七; Neptune eighth 海王星 八
""")

UNITS = table("""
minutes hour 60 小时 分钟; seconds minute 60 分钟 秒; hours day 24 天 小时; days week 7 星期 天; months year 12 年 个月;
years century 100 世纪 年; meters kilometer 1000 公里 米; centimeters meter 100 米 厘米; millimeters centimeter 10 厘米 毫米;
grams kilogram 1000 公斤 克; milliliters liter 1000 升 毫升; kilograms tonne 1000 吨 公斤; inches foot 12 英尺 英寸;
feet yard 3 码 英尺; bits byte 8 字节 位; degrees circle 360 圆 度; sides triangle 3 三角形 条边; sides square 4 正方形 条边;
sides pentagon 5 五边形 条边; sides hexagon 6 六边形 条边; legs insect 6 昆虫 条腿; letters alphabet 26 英文字母表 个字母
""")

OPPOSITES = table("""
big small 大 小; hot cold 热 冷; fast slow 快 慢; tall short 高 矮; happy sad 高兴 难过; light dark 亮 暗; rich poor 富 穷;
full empty 满 空; young old 年轻 年老; strong weak 强 弱; wet dry 湿 干; hard soft 硬 软; early late 早 晚; near far 近 远;
open closed 开 关; clean dirty 干净 脏; loud quiet 吵 安静; deep shallow 深 浅; wide narrow 宽 窄; thick thin 厚 薄;
sweet bitter 甜 苦; brave afraid 勇敢 害怕; first last 第一 最后; day night 白天 夜晚; up down 上 下; left right 左 右;
north south 北 南; east west 东 西; begin end 开始 结束; love hate 爱 恨
""")

TRANSLATIONS = table("""
apple 苹果; banana 香蕉; bread 面包; book 书; water 水; fire 火; mountain 山; river 河; sea 海; sun 太阳; moon 月亮; star 星星;
rain 雨; snow 雪; wind 风; tree 树; flower 花; house 房子; door 门; window 窗户; road 路; bridge 桥; school 学校; teacher 老师;
student 学生; doctor 医生; friend 朋友; mother 母亲; father 父亲; child 孩子; king 国王; horse 马; dog 狗; cat 猫; bird 鸟;
fish 鱼; tea 茶; coffee 咖啡; milk 牛奶; rice 米饭; egg 鸡蛋; salt 盐; sugar 糖; red 红色; blue 蓝色; green 绿色; white 白色;
black 黑色; yellow 黄色; train 火车; ship 船; bicycle 自行车; music 音乐; song 歌; letter 信; clock 钟; chair 椅子; table 桌子;
bed 床; lamp 灯; stone 石头; forest 森林; garden 花园; city 城市; village 村庄; winter 冬天; summer 夏天; spring 春天;
autumn 秋天; morning 早上; evening 晚上; today 今天; tomorrow 明天; yesterday 昨天; pagoda 塔
""")

COLOURS = table("""
red yellow orange 红色 黄色 橙色; blue yellow green 蓝色 黄色 绿色; red blue purple 红色 蓝色 紫色; red white pink 红色 白色 粉色;
black white gray 黑色 白色 灰色
""")

SCIENCE = table(
    """
Who wrote Hamlet?|William Shakespeare wrote Hamlet.;
Who wrote Don Quixote?|Miguel de Cervantes wrote Don Quixote.;
Who painted the Mona Lisa?|Leonardo da Vinci painted the Mona Lisa.;
What is the longest river in Africa?|The longest river in Africa is the Nile.;
What is the highest mountain on Earth?|The highest mountain on Earth is Mount Everest.;
What is the largest ocean?|The largest ocean is the Pacific.;
What is the largest planet?|The largest planet is Jupiter.;
What is the smallest planet?|The smallest planet is Mercury.;
What is the largest animal?|The largest animal is the blue whale.;
What is the fastest land animal?|The fastest land animal is the cheetah.;
What is the tallest animal?|The tallest animal is the giraffe.;
What is water made of?|Water is made of hydrogen and oxygen.;
At what temperature does water boil?|Water boils at 100 degrees Celsius.;
At what temperature does water freeze?|Water freezes at 0 degrees Celsius.;
What do bees make?|Bees make honey.;
What do plants need to grow?|Plants need light, water and air to grow.;
Who was the first person on the moon?|Neil Armstrong was the first person on the moon.;
Who discovered gravity?|Isaac Newton described gravity.;
Who developed the theory of relativity?|Albert Einstein developed the theory of relativity.;
How many continents are there?|There are seven continents.;
How many planets are there?|There are eight planets.;
What is a pagoda?|A pagoda is a tower with many roofs, one above the other.;
What color is the sky?|The sky is blue.;
What color is grass?|Grass is green.;
世界上最高的山是什么？|世界上最高的山是珠穆朗玛峰。;
世界上最大的海洋是什么？|世界上最大的海洋是太平洋。;
最大的行星是什么？|最大的行星是木星。;
中国最长的河是什么？|中国最长的河是长江。;
水在多少度沸腾？|水在100摄氏度沸腾。;
水在多少度结冰？|水在0摄氏度结冰。;
天空是什么颜色？|天空是蓝色的。;
一共有几大洲？|一共有七大洲。;
谁写了《红楼梦》？|曹雪芹写了《红楼梦》。;
谁写了《西游记》？|吴承恩写了《西游记》。
""",
    "|",
)

_ELEMENT = ("element", "symbol", "number", "元素")
_ANIMAL = ("animal", "young", "legs", "kind", "动物")
_PLANET = ("planet", "place", "行星", "序")
_UNIT = ("small", "large", "number", "大", "小")
_LEGGED = tuple(row for row in ANIMALS if row[0] not in ("butterfly", "bee"))
_PAIRS = OPPOSITES + tuple((b, a, d, c) for a, b, c, d in OPPOSITES)
_MIXES = COLOURS + tuple((b, a, c, e, d, f) for a, b, c, d, e, f in COLOURS)

RELATIONS = (
    Relation(COUNTRY_COLUMNS, COUNTRIES, ("What is the capital of {country}?", "What's the capital of {country}?", "capital of {country}",
        "Tell me the capital of {country}.", "Which city is the capital of {country}?", "Name the capital city of {country}.",
        "Do you know the capital of {country}?"), "The capital of {country} is {capital}."),
    Relation(COUNTRY_COLUMNS, COUNTRIES, ("{capital} is the capital of which country?", "Which country has {capital} as its capital?",
        "What country is {capital} the capital of?", "Of which country is {capital} the capital?"), "{capital} is the capital of {country}."),
    Relation(COUNTRY_COLUMNS, COUNTRIES, ("On which continent is {country}?", "Which continent is {country} in?", "Where is {country}?",
        "What continent is {country} on?"), "{country} is in {continent}."),
    Relation(COUNTRY_COLUMNS, COUNTRIES, ("{国}的首都是哪里？", "{国}的首都是什么？", "{国}首都是哪个城市？", "请问{国}的首都在哪里？",
        "你知道{国}的首都吗？"), "{国}的首都是{都}。", "zh"),
    Relation(COUNTRY_COLUMNS, COUNTRIES, ("{都}是哪个国家的首都？", "哪个国家的首都是{都}？", "{都}是哪国的首都？"), "{都}是{国}的首都。", "zh"),
    Relation(COUNTRY_COLUMNS, COUNTRIES, ("{国}在哪个洲？", "{国}属于哪个大洲？", "{国}位于哪个洲？"), "{国}在{洲}。", "zh"),
    Relation(_ELEMENT, ELEMENTS, ("What is the chemical symbol of {element}?", "What is the symbol for {element}?", "symbol of {element}",
        "Tell me the symbol of {element}."), "The symbol of {element} is {symbol}."),
    Relation(_ELEMENT, ELEMENTS, ("Which element has the symbol {symbol}?", "What element is {symbol}?",
        "What does the chemical symbol {symbol} stand for?"), "{symbol} is the symbol of {element}."),
    Relation(_ELEMENT, ELEMENTS, ("What is the atomic number of {element}?", "Which atomic number does {element} have?",
        "atomic number of {element}"), "The atomic number of {element} is {number}."),
    Relation(_ELEMENT, ELEMENTS, ("Which element has atomic number {number}?", "What element has the atomic number {number}?"),
        "The element with atomic number {number} is {element}."),
    Relation(_ELEMENT, ELEMENTS, ("{元素}的元素符号是什么？", "{元素}的化学符号是什么？"), "{元素}的元素符号是{symbol}。", "zh"),
    Relation(_ELEMENT, ELEMENTS, ("{元素}的原子序数是多少？", "{元素}是第几号元素？"), "{元素}的原子序数是{number}。", "zh"),
    Relation(_ANIMAL, ANIMALS, ("What is a young {animal} called?", "What do you call a baby {animal}?", "What is the young of a {animal} called?"),
        "A young {animal} is called a {young}."),
    Relation(_ANIMAL, ANIMALS, ("A {young} is the young of which animal?", "What animal does a {young} grow into?"),
        "A {young} grows into a {animal}."),
    Relation(_ANIMAL, _LEGGED, ("How many legs does a {animal} have?", "How many legs has a {animal}?"), "A {animal} has {legs} legs."),
    Relation(_ANIMAL, ANIMALS, ("What kind of animal is a {animal}?", "What sort of animal is the {animal}?"), "A {animal} is a kind of {kind}."),
    Relation(_ANIMAL, _LEGGED, ("{动物}有几条腿？", "{动物}有多少条腿？"), "{动物}有{legs}条腿。", "zh"),
    Relation(_PLANET, PLANETS, ("Which planet is {place} from the sun?", "What is the {place} planet from the sun?"),
        "The {place} planet from the sun is {planet}."),
    Relation(_PLANET, PLANETS, ("Which place does {planet} have from the sun?", "Counted from the sun, which planet is {planet}?"),
        "{planet} is the {place} planet from the sun."),
    Relation(_PLANET, PLANETS, ("离太阳第{序}近的行星是哪个？", "从太阳数起第{序}颗行星是什么？"), "第{序}颗行星是{行星}。", "zh"),
    Relation(_UNIT, UNITS, ("How many {small} are in one {large}?", "How many {small} are there in a {large}?", "How many {small} does one {large} have?"),
        "One {large} has {number} {small}."),
    Relation(_UNIT, UNITS, ("一{大}有多少{小}？", "一个{大}等于多少{小}？", "一{大}是多少{小}？"), "一{大}有{number}{小}。", "zh"),
    Relation(("a", "b", "甲", "乙"), _PAIRS, ("What is the opposite of {a}?", "opposite of {a}", "Tell me the opposite of {a}.",
        "Which word means the opposite of {a}?"), "The opposite of {a} is {b}."),
    Relation(("a", "b", "甲", "乙"), _PAIRS, ("{甲}的反义词是什么？", "“{甲}”的反义词是什么？"), "{甲}的反义词是{乙}。", "zh"),
    Relation(("en", "zh"), TRANSLATIONS, ("What is {en} in Chinese?", "How do you say {en} in Chinese?", "Translate {en} into Chinese.",
        "{en} in Chinese"), "In Chinese, {en} is {zh}."),
    Relation(("en", "zh"), TRANSLATIONS, ("What does {zh} mean in English?", "What is {zh} in English?", "Translate {zh} into English."),
        "In English, {zh} is {en}."),
    Relation(("en", "zh"), TRANSLATIONS, ("{zh}用英语怎么说？", "{zh}的英文是什么？", "把{zh}翻译成英文。"), "{zh}的英文是{en}。", "zh"),
    Relation(("a", "b", "c", "甲", "乙", "丙"), _MIXES, ("What color do {a} and {b} make?", "Which color do you get if you mix {a} and {b}?"),
        "{a} and {b} make {c}."),
    Relation(("a", "b", "c", "甲", "乙", "丙"), _MIXES, ("{甲}和{乙}混合是什么颜色？",), "{甲}和{乙}混合是{丙}。", "zh"),
    Relation(("q", "a"), tuple(row for row in SCIENCE if row[0].isascii()), ("{q}",), "{a}"),
    Relation(("q", "a"), tuple(row for row in SCIENCE if not row[0].isascii()), ("{q}",), "{a}", "zh"),
)  # fmt: skip

WORDS = tuple("""
apple arrow autumn baker banana basket beach bell bird boat book bottle branch bread bridge bucket butter button cabin cake
candle carpet castle chair cheese cherry circle city clock cloud coat coffee corner cotton cup dance desert dinner doctor door
dragon dream drum eagle earth engine evening farm feather field fire flag flower forest fork fox frog garden gate ghost glass
gold grape grass guitar hammer harbor hat heart hill honey horse hotel house island jacket jar jewel juice kettle key king
kitchen kite knife ladder lake lamp leaf lemon letter lion magic map market meadow melon milk mirror monkey moon morning
mountain mouse music needle nest night north oak ocean olive onion orange oven owl paint palace paper pear pearl pencil
pepper piano picture pillow planet plate pocket poem potato prince queen rabbit rain ribbon ring river road robot rocket
roof rope rose sail salt sand school shadow sheep shell ship shoe silver snow soap song spoon spring square star stone
storm story street sugar summer sun table tea tent tiger tomato tower train tree turtle umbrella valley village violin
wagon wall watch water whale wheel wind window winter wolf wood yard zebra
""".split())  # fmt: skip

NAMES = tuple("""
Ada Adam Alice Amir Anna Aria Ben Bella Carl Clara Daniel Diana Eli Elena Emma Eric Eva Felix Fiona Frank Grace Hana Hugo
Ida Ivan Jack Jana Julia Kai Kate Leo Lena Lily Lucas Luna Maria Mark Max Mia Mila Nadia Nina Noah Nora Oliver Omar Oscar
Paul Petra Rosa Ruby Sam Sara Simon Sofia Tara Theo Tom Vera Victor Yara Zoe
""".split())  # fmt: skip
NAMES_ZH = tuple(
    "小明 小红 小华 小丽 小芳 小刚 小美 小军 小雨 小雪 李明 王芳 张伟 刘洋 陈静 杨光 赵雷 周杰 吴敏 林林".split()
)
CITIES = tuple(row[1] for row in COUNTRIES)
CITIES_ZH = tuple(row[4] for row in COUNTRIES)
JOBS = tuple(
    "teacher doctor baker farmer painter pilot nurse cook writer singer dancer sailor gardener engineer lawyer".split()
)
FAVOURITES = {
    "color": (tuple("red blue green yellow white black purple orange pink gray".split()), "颜色", tuple("红色 蓝色 绿色 黄色 白色 黑色 紫色".split())),
    "animal": (tuple("cat dog horse owl fox rabbit tiger lion bear whale turtle eagle".split()), "动物", tuple("猫 狗 马 兔子 老虎 狮子 熊猫 鹰".split())),
    "food": (tuple("pizza rice soup bread cheese noodles cake salad fish pasta".split()), "食物", tuple("米饭 面条 饺子 蛋糕 面包 鱼".split())),
    "fruit": (tuple("apple banana cherry grape lemon melon orange pear plum".split()), "水果", tuple("苹果 香蕉 葡萄 西瓜 橙子 梨".split())),
    "season": (tuple("spring summer autumn winter".split()), "季节", tuple("春天 夏天 秋天 冬天".split())),
    "drink": (tuple("tea coffee milk juice water cocoa lemonade".split()), "饮料", tuple("茶 咖啡 牛奶 果汁 水".split())),
}  # fmt: skip
