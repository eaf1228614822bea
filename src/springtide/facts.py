"""The recall task in words: facts hidden in a text, questions about them, and the answers expected.

The pocket model is trained on exactly this wording and the needle evaluation asks with it.
"""

_NOUNS = """
    acorn alley almond amber anchor angel ankle apple apron arch armor arrow ash atlas attic autumn avenue
    axe badge bag bakery ball bamboo banana banjo bank banner barley barn barrel basin basket bath beach
    bead beak beam bean bear beard bed beetle bell belt bench berry bicycle bird blade blanket blossom board
    boat bolt bone bonnet book boot bottle boulder bowl box bracelet branch brass bread brick bridge broom
    brush bubble bucket buckle butter button cabin cabinet cable cage cake camel camera canal candle cannon
    canoe canvas cape carpet carrot cart castle cat cave cedar cellar chain chair chalk chapel cheese cherry
    chest chimney circle clay cliff cloak clock cloth cloud clover coal coast coat coin comb compass copper
    coral cork corn cottage cotton cow crab cradle crane cream creek cross crow crown crystal cup curtain
    cushion dagger daisy dam deer desert desk diamond dish dog doll dolphin donkey door dove dragon drawer
    dress drum duck eagle easel egg elbow elephant elm ember engine envelope falcon farm feather fence fern
    ferry fiddle field fig finger flag flame flask flint floor flour flower flute forest fork fort fountain
    fox frog frost garden garlic gate ginger glacier glass glove goat goose grain grape grass gravel guitar
    hammer hammock harbor harp hat hawk hazel hedge helmet hen heron hill hinge honey hook horn horse hotel
    house ice igloo ink iron island ivory ivy jacket jar jewel judge jug juniper kettle key king kite
    kitchen knife knot ladder lake lamb lamp lantern lark lawn leaf leather lemon letter library lily lime
    linen lion lizard lobster lock log loom magnet mango mantle map maple marble market mask mast meadow
    medal melon mill mint mirror mitten moat mole monkey moon moss moth mountain mouse mug mushroom nail
    napkin necklace needle nest net nut oak oar oasis oat ocean olive onion orange orchard organ otter oven
    owl ox oyster paddle page paint palace palm pan paper parcel parrot path peach peacock pear pearl pebble
    pen pencil penny pepper piano pier pigeon pillar pillow pine pipe plate plow plum pocket pond poppy
    porch potato powder prairie prism pumpkin puppet purse quarry queen quill quilt rabbit radish raft rain
    raven reed ribbon rice ring river road robe robin rock roof rope rose rug saddle sail salmon salt sand
    sapphire saw scarf school seal seed shadow sheep shell shield ship shoe shovel silk silver slate sled
    slipper smoke snail snow soap sofa soup spade sparrow spear spice spider spoon spring squirrel stable
    star statue steam stone stove straw street sugar swan sword table tail tailor tea temple tent thimble
    thistle thorn throne thunder tiger timber toad tomato torch tower trail train tray trumpet tulip tunnel
    turtle umbrella valley vase velvet vessel village vine violet violin wagon wall walnut watch water whale
    wheat wheel whistle willow window wing winter wolf wood wool
"""

WORDS: tuple[str, ...] = tuple(_NOUNS.split())


def fact(word: str, digits: str) -> str:
    """The sentence that states the fact; it begins with a space and so follows any sentence."""
    return f" The magic number for {word} is {digits}."


def question(word: str) -> str:
    """The question; it ends where the answer has to begin."""
    return f"\n\nQuestion: what is the magic number for {word}? Answer:"


def answer(word: str, digits: str) -> str:
    """The answer expected after `question(word)`."""
    return f" the magic number for {word} is {digits}."
