"""General words, and the names under which people speak of what they mean: "no people" means no man and no child.

Texts beside a photo, and the captions that models learn from, say "a man" and seldom "people". The list is our own, of
plain English; nine in ten of Flickr8k's train captions that speak of somebody do so by one of the names of people.
"""

from functools import cache
from typing import NamedTuple

from indexer.full_text import STOP_WORDS, words

# what is written for a kind: names that the matching model reads as well, each at the price of a query; other names
KINDS = {
    "people/person/persons/human/humans/anybody/everybody": (
        "man, woman, child; men, women, children, boy, girl, baby, kid, toddler, teenager, adult, lady, guy, "
        "gentleman, crowd, friends, bride, groom, soldier, worker, player, athlete, runner, swimmer, cyclist, skier, "
        "snowboarder, skateboarder, surfer, climber, hiker, musician, dancer, tourist, student, "
        "rider, biker, bicyclist, motorcyclist, skater, kayaker, wrestler, spectators, someone, male, female, family"
    ),
    "men/man": "man; guy, gentleman, gentlemen, father, dad, grandfather, groom, male, businessman",
    "women/woman": "woman; lady, mother, mom, mum, grandmother, bride, female, businesswoman",
    "children/child/kids/kid": "child; boy, girl, baby, toddler, infant, schoolchildren",
    "boys/boy": "boy; son, lad, schoolboy",
    "girls/girl": "girl; daughter, schoolgirl",
    "babies/baby": "baby; infant, newborn, toddler",
    "animals/animal": (
        "dog, cat, bird; horse, puppy, kitten, pony, cow, bull, sheep, lamb, goat, pig, rabbit, duck, goose, chicken, "
        "mouse, squirrel, fox, wolf, bear, lion, tiger, elephant, giraffe, zebra, deer, camel, monkey, fish, turtle, "
        "frog, snake, lizard, insect, butterfly, bee, spider, pet, wildlife"
    ),
    "dogs/dog": (
        "dog; puppy, terrier, retriever, labrador, poodle, sheepdog, hound, greyhound, dachshund, husky, spaniel, "
        "bulldog, beagle, collie, corgi, chihuahua"
    ),
    "cats/cat": "cat; kitten",
    "birds/bird": (
        "bird; duck, goose, geese, swan, gull, seagull, pigeon, parrot, eagle, hawk, owl, chicken, crow, sparrow"
    ),
    "horses/horse": "horse; pony, foal",
    "vehicles/vehicle/traffic": "car, truck; bus, motorcycle, van, taxi, jeep, bicycle, train, tram, tractor",
    "cars/car": "car; automobile, jeep, taxi, sedan, convertible",
    "bicycles/bicycle/bikes/bike": "bicycle; cyclist",
    "motorcycles/motorcycle/motorbikes/motorbike": "motorcycle; dirt bike, moped",
    "boats/boat": "boat; ship, sailboat, canoe, kayak, raft, yacht, ferry, rowboat",
    "airplanes/airplane/planes/plane": "airplane; aeroplane, aircraft, jet",
    "buildings/building": "building; house, tower, church, skyscraper, castle, apartment, shop, store",
    "streets/street/roads/road": "street; sidewalk, crosswalk, highway, alley, pavement",
    "trees/tree": "tree; forest, woods, jungle, palm",
    "plants/plant": "tree, flower; grass, bush",
    "flowers/flower": "flower; rose, tulip, daisy, sunflower, bouquet, blossom",
    "grass": "; lawn, meadow, grassy",
    "water": "; lake, river, ocean, sea, pool, pond, stream, creek, fountain, waterfall, puddle, "
    "swimming, swimmer, surf, surfer, surfing, kayak, raft, splash, sprinkler",
    "beaches/beach": "beach; seashore, shore, seaside",
    "sand": "; beach, dune, sandy, sandbox",
    "snow": "; snowy, snowball, snowman, blizzard",
    "mountains/mountain": "mountain; peak, cliff, mountainside, mountainous",
    "sports/sport": "; soccer, football, basketball, tennis, baseball, hockey, rugby, volleyball",
    "balls/ball": "ball; football, basketball, baseball, volleyball, softball",
    "toys/toy": "toy; doll, teddy bear, ball, frisbee, balloon",
    "food": "; meal, fruit, cake, pizza, bread, sandwich, lunch, dinner",
    "drinks/drink": "drink; beer, wine, coffee, juice, bottle",
    "hats/hat": "hat; cap, helmet, beanie, hood",
    "glasses": "; sunglasses, goggles, eyeglasses",
    "clothes/clothing": "; shirt, dress, jacket, trousers, coat, skirt",
    "furniture": "; chair, table, sofa, couch, bed, bench",
    "skateboards/skateboard": "skateboard; skateboarder, skateboarding, longboard",
    "skis/ski": "ski; skier, skiing",
    "pools/pool/swimming pools/swimming pool": "swimming pool; pool",
    "fire/fires": "; campfire, bonfire, flame",
}


class Names(NamedTuple):
    """Under what a phrase's things are spoken of: texts for the matching model to read, and words beside a photo."""

    read: tuple[str, ...]
    beside: tuple[str, ...]


def names(phrase: str) -> Names:
    """The phrase itself first, then the names of its kind where it is one of KINDS."""
    said = " ".join(word for word in words(phrase) if word not in STOP_WORDS)
    read, beside = _kinds().get(said, ((), ()))
    read = dict.fromkeys([phrase, *(name for name in read if name != said)])
    return Names(tuple(read), tuple(dict.fromkeys([phrase, *beside])))


@cache
def _kinds() -> dict[str, tuple[list[str], list[str]]]:
    found = {}
    for written, listed in KINDS.items():
        read, others = ([name.strip() for name in part.split(",") if name.strip()] for part in listed.split(";"))
        each = written.split("/")
        found |= dict.fromkeys(each, (read, [*read, *others, *each]))
    return found
