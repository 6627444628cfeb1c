"""Things that people look for, and the words by which a caption speaks of them: for measuring search on Flickr8k.

A thing's pattern is wide on purpose: a photo none of whose five captions has one of these words does not show the
thing, as far as captions can tell. Written by hand from the words of Flickr8k's dev captions, before any measurement.
"""

import re

SOUGHT = {  # what is looked for where there may be none of it
    "a dog": (
        r"dogs?|pupp(?:y|ies)|hounds?|labradors?|poodles?|terriers?|retrievers?|shepherds?|collies?|greyhounds?|"
        r"canines?|beagles?|dachshunds?|corgis?|boxer|lab|husk(?:y|ies)|mutt|dalmatian|rottweilers?|pug|spaniel|"
        r"setter|sheepdog|doberman|schnauzer|pitbull"
    ),
    "a cat": r"cats?|kittens?|kitt(?:y|ies)",
    "a horse": r"horses?|pony|ponies|horseback|equestrian|foal|rodeo|jockey|bronco",
    "a bird": (
        r"birds?|ducks?|geese|goose|pigeons?|seagulls?|gulls?|parrots?|eagles?|swans?|owl|falcon|chickens?|hawk|"
        r"flamingos?|turkey|pelican|stork|heron|crane|peacock|cockatoo|feathered"
    ),
    "snow": (
        r"snow\w*|ski|skis|skiing|skiers?|skier|skies|sled\w*|ice|icy|snowboard\w*|sledding|wintery?|toboggan|"
        r"blizzard|igloo|avalanche"
    ),
    "a beach": r"beach\w*|sand|sandy|shore\w*|seaside|ocean|surf\w*|sea|dune\w*|coast\w*|waves?",
    "a swimming pool": r"pools?|swim\w*|diving|dives?|div(?:er|ing)",
    "a surfer on a wave": r"surf\w*|waves?|boogie|wakeboard\w*|windsurf\w*|bodyboard\w*|wind",
    "a boat": (
        r"boats?|kayak\w*|canoe\w*|raft\w*|sail\w*|ship|rowing|row|rowboat|ferry|yacht|paddl\w*|oars?|motorboat|"
        r"gondola|vessel|barge|speedboat|jet|dock"
    ),
    "a bicycle": r"bik\w*|bicycl\w*|cycl\w*|bmx|mountainbik\w*|tricycle|unicycle|pedal\w*",
    "a motorcycle": r"motor\w*|dirt\w*|motocross|moped|scooters?|bikers?|biker|atv|bikes?|quad\w*",
    "a car": (
        r"cars?|automobiles?|jeep|truck|van|vehicles?|suv|taxi|racecar|limo\w*|traffic|convertible|sedan|auto|"
        r"minivan|pickup|driv\w*|wheeler"
    ),
    "a skateboarder": r"skate\w*|skateboard\w*|ramp|longboard|half-?pipe",
    "a snowboarder": r"snow\w*|ski\w*|slope|mountain|winter\w*",
    "a football game": (
        r"football\w*|quarterback|sooners|rugby|tackl\w*|touchdown|helmets?|nfl|jersey|jerseys|team\w*|players?|"
        r"uniforms?|oklahoma"
    ),
    "a basketball game": r"basketball\w*|hoops?|dunk\w*|players?|jerseys?|lakers|nba|court|uniforms?",
    "a soccer game": r"soccer|goal\w*|players?|football\w*|kick\w*|uniforms?|jerseys?",
    "a tennis player": r"tennis|racquets?|rackets?|court",
    "a baseball game": r"baseball\w*|softball|bat|batter|pitch\w*|umpire|bases?|catcher|mitt|bats|uniforms?",
    "ice hockey": r"hockey|ice|puck|rink|skat\w*",
    "a frisbee": r"frisb\w*|disc|disk|disks",
    "a tennis ball": r"balls?|tennis",
    "a rock climber": r"climb\w*|cliff\w*|rocks?|rappel\w*|boulder\w*|harness|mountain\w*|ledge|rope",
    "a waterfall": r"waterfalls?|falls",
    "a fountain": r"fountains?|sprinkler\w*|spray\w*|hydrant|water",
    "a trampoline": r"trampolin\w*|bounc\w*|inflatable|jump\w*",
    "a swing": r"swing\w*|playground\w*",
    "a slide": r"slid\w*|playground\w*|waterslide",
    "a guitar": r"guitar\w*|band|music\w*|bass|instrument\w*|ukulele|banjo|mandolin",
    "a microphone": r"micro\w*|mic|sing\w*|karaoke|band|mike|perform\w*|speak\w*",
    "sunglasses": r"sunglass\w*|shades|goggles|glasses|eyeglasses",
    "a hat": r"hats?|caps?|beanie|beret|sombrero\w*|helmets?|hardhat|visor|bonnet|headgear|hooded|hood|turban",
    "a tent": r"tents?|camp\w*|canopy",
    "a campfire": r"camp\w*|fires?|bonfire|flames?|burn\w*|grill\w*",
    "fireworks": r"firework\w*|sparkler\w*|fire",
    "a baby": r"bab(?:y|ies)|infant|toddlers?|newborn|crib|stroller",
    "a bride": r"brid\w*|wedding|groom|veil|gown|married",
    "food on a table": (
        r"food|eat\w*|meal|dinner|lunch|restaurant|table\w*|breakfast|picnic|cook\w*|dining|pizza|cake|snack|"
        r"plate|dish\w*|sandwich\w*|barbecue"
    ),
    "an ice cream cone": r"ice|cream|popsicle|cone|dessert|lollipop|sno",
    "a birthday cake": r"cakes?|birthday|cupcake|icing|frosting",
    "a bus": r"bus|buses|trolley",
    "a train": r"trains?|subway|railroad|railway|tracks?|locomotive|tram",
    "an airplane": r"plane|airplanes?|jet|aircraft|airport|helicopter|glider",
    "a bridge": r"bridges?",
    "a lake with mountains": r"lakes?|mountains?|mountainous|mountainside|hills?",
    "a sunset": r"sunset|sunrise|dusk|dawn|sun|silhouett\w*|evening",
    "a city at night": r"night\w*|city|lights?|dark",
    "a crowd of people": r"crowd\w*|audience|spectators?|parade|festival|concert|many|lots|group|protest\w*|fans",
    "a parade": r"parade\w*|festival|marching|costumes?|float",
    "a person in a costume": r"costum\w*|dressed|mask\w*|clown\w*|outfit\w*|halloween|disguise\w*",
    "graffiti": r"graffiti\w*|mural\w*|painted|painting",
    "a tree": r"trees?|forests?|woods?|wooded|leaves|branch\w*|palm\w*|log|pine",
    "flowers": r"flowers?|floral|garden\w*|roses?|blossoms?|tulips?|bouquet|sunflowers?|daisies",
    "a sheep": r"sheep|lambs?|goats?|herd\w*|ram",
    "a cow": r"cows?|bulls?|cattle|calf|steer|oxen|rodeo|bison|buffalo",
    "an elephant": r"elephants?",
    "a fish": r"fish\w*|shark|aquarium",
    "fishing": r"fish\w*",
    "kissing": r"kiss\w*",
    "a man playing drums": r"drum\w*|band|percussion|instrument\w*",
    "a laptop": r"laptops?|computers?|screen",
    "a cell phone": r"phones?|cellphones?|cell|texting|telephone",
    "a camera": r"cameras?|photo\w*|picture\w*|tripod|camcorder|video\w*|film\w*|lens",
    "a wheelchair": r"wheelchairs?",
    "a soldier": r"soldiers?|military|army|uniform\w*|marines?|sailors?|camouflage|guards?",
    "a policeman": r"polic\w*|cops?|officers?|uniform\w*|guards?",
    "an old man with a beard": r"beard\w*|mustache|moustache|goatee|elderly|old\w*",
    "a snowball fight": r"snow\w*",
    "mud": r"mud\w*|dirt\w*|muck",
    "a motorboat on a river": r"boats?|rivers?|stream|creek|raft\w*|canoe\w*|kayak\w*|rapids",
}
LEFT_OUT = {  # the X and Y of "X without Y"
    "dogs": (
        r"dogs?|pupp(?:y|ies)|hounds?|labradors?|poodles?|terriers?|retrievers?|shepherds?|collies?|greyhounds?|"
        r"canines?|beagles?|dachshunds?|husk(?:y|ies)|mutts?|spaniels?|bulldogs?|dalmatians?"
    ),
    "people": (
        r"people|persons?|m[ae]n|wom[ae]n|boys?|girls?|child|children|kids?|lad(?:y|ies)|guys?|toddlers?|"
        r"bab(?:y|ies)|adults?|teenagers?|teens?|youths?|males?|females?|crowds?|couples?|famil(?:y|ies)|friends|"
        r"players?|riders?|bikers?|cyclists?|skaters?|skateboarders?|snowboarders?|skiers?|surfers?|climbers?|"
        r"hikers?|swimmers?|runners?|kayakers?|motorcyclists?|bicyclists?|audience|group|human|someone|"
        r"individuals?|performers?|workers?|musicians?|dancers?|soldiers?|pedestrians?|tourists?|fans?|"
        r"spectators?|onlookers?|rollerbladers?|acrobats?|clowns?|policem[ae]n|snowmobilers?|jockeys?|cowboys?|"
        r"anglers?|fisherm[ae]n|divers?|gymnasts?|wrestlers?|boxers?|infants?|grandm\w*|grandf\w*|mothers?|"
        r"fathers?|moms?|dads?|sisters?|brothers?|owner|trainer|his|her|bride|groom"
    ),
    "men": r"m[ae]n|guys?|males?|father|dads?|boys?|gentlem[ae]n",
    "women": r"wom[ae]n|lad(?:y|ies)|females?|mothers?|moms?|girls?|bride",
    "children": r"child|children|kids?|boys?|girls?|toddlers?|bab(?:y|ies)|infants?|youths?|teens?|teenagers?",
    "water": (
        r"water|ocean|sea|lake|river|pools?|ponds?|streams?|creek|waves?|beach|surf\w*|swim\w*|splash\w*|wet|"
        r"puddles?|fountains?|waterfall|kayak\w*|boats?|raft\w*|shore\w*|sprinklers?"
    ),
    "snow": r"snow\w*|ski|skis|skiing|skiers?|sled\w*|ice|icy",
    "grass": r"grass\w*|lawn|fields?|meadow|yard|park",
    "a ball": r"\w*balls?|tennis|soccer|rugby",
    "a bicycle": r"bik\w*|bicycl\w*|cycl\w*|bmx",
    "a beach": r"beach\w*|sand\w*|shore\w*|seaside|ocean|coast\w*|dunes?",
    "trees": r"trees?|forests?|woods?|wooded|branch\w*|palms?|leaves|jungle",
    "cars": r"cars?|automobiles?|jeeps?|trucks?|vans?|vehicles?|taxis?|traffic|bus|buses",
    "a hat": r"hats?|caps?|beanie|helmets?|visor|bonnet|hood\w*|headgear",
    "sunglasses": r"sunglass\w*|goggles|glasses|shades",
    "mountains": r"mountain\w*|hills?|cliffs?|rocks?|rocky|peaks?|canyon|slopes?",
    "a building": (
        r"buildings?|house\w*|store\w*|shops?|city|street|wall|church|skyscrapers?|downtown|urban|architecture"
    ),
    "a skateboard": r"skate\w*|longboard",
    "a swimming pool": r"pools?",
    "a leash": r"leash\w*|collar\w*|muzzle\w*",
    "a stick": r"sticks?|branch\w*|twig",
    "toys": r"toys?|frisb\w*|ball\w*|doll\w*|stuffed",
    "a street": r"streets?|roads?|sidewalks?|city|cars?|traffic|crosswalk|pavement|alley|downtown",
    "sports": r"football|soccer|basketball|tennis|baseball|hockey|rugby|players?|game|team\w*|volleyball|softball",
    "a bench": r"bench\w*",
    "sand": r"sand\w*|beach\w*|dunes?|desert",
}


def mentions(pattern: str, captions: list[str]) -> int:
    """How many of a photo's captions speak of a thing."""
    spoken = re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
    return sum(bool(spoken.search(caption)) for caption in captions)
