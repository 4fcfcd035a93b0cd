"""A seeded generator of small English documents: the training text of the embedded tiny models.

The text is made of stories, dialogues, letters, recipes, weather reports, questions with answers, notices and
instruction-shaped documents.  Two tables describe all of it:

* ``_LEXICON``: content words by sort ("thing", "place", "mood" ...), each sort in three groups: *shared* words, words
  of the *train* split only, and words of the *heldout* split only;
* ``_RULES``: a phrase grammar.  Each rule has the alternatives of the training split and, below a ``---`` line, those
  of the held-out split.  A document of one split never uses an alternative of the other one.

Notation of an alternative:

    <rule> <rule:b>     another rule of the same split; ``@`` in that rule stands for the argument
    {thing} {thing2}    a word bound for the whole document: the second mention repeats the first
    {*thing}            a fresh word each time
    {a} {b} {c}         persons, with .he .him .his .himself .role .kin (.He, .His: at the start of a sentence)
    {x.s .ed .ing .es}  inflected forms; {x.x}: the noun with its own adjectives; {x.v}: the value of a "key=value" word
    [text] (one|two)    an optional part; a choice
    ~                   a line break

The two splits make "unseen words and unseen templates" a property that can be computed (``tests/test_corpus.py``).
Names are the words that matter most: thousands of them are put together from syllables, so a model can only get
the second mention of a name right by looking back at the first one, which is what attention has over n-grams.

    python tools/corpus.py --split train --chars 2000 --seed 0
    python tools/corpus.py --instructions > examples/assets/instructions.jsonl
"""

import argparse
import json
import random
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

SPLITS = ("train", "heldout")

# ---------------------------------------------------------------------------------------------------------------------
# Words.  Three groups a sort, separated by "|": shared | train only | heldout only.  "_" is a space inside an entry.

_LEXICON = {
    "thing": """
        lantern kettle basket ribbon whistle mirror blanket hammer bucket candle compass drum feather fiddle flute hat
        jar key kite ladder map marble needle notebook paddle pencil pillow pot purse ring rope scarf shell shovel spoon
        stool ticket trumpet umbrella vase wheel broom bell book boot bottle bowl box brush button cage cap cart chain
        chair clock coat coin comb cup doll fork glove jug knife lamp letter medal mug net parcel picture plate rug
        | sack saddle sled sword teapot thimble torch tray violin wagon watch crown dagger drawer envelope flag horn
        kennel mask ornament painting quilt rake razor ruler sponge spyglass statue telescope toy trowel tub
        | goblet satchel spade sickle tambourine locket bracelet pitcher anvil lute mitten banner cradle bonnet crate
        tankard bagpipe brooch cushion""",
    "size": """small big tiny huge little long short heavy narrow wide tall | enormous slender bulky
        | hefty dainty stubby""",
    "look": """old new shiny dusty broken plain pretty rusty painted cracked polished dented simple lovely strange clean
        dirty smooth rough round square curved bright dull | battered crooked ancient handsome spotless striped
        | tarnished gleaming tattered speckled ornate""",
    "colour": """red blue green yellow white black brown grey orange purple pink silver golden | scarlet
        | crimson turquoise""",
    "material": """wooden copper iron clay glass brass leather paper stone tin steel bone | bamboo marble
        | pewter porcelain bronze""",
    "place": """harbour market mill bridge forest river bakery chapel barn orchard garden library station school field
        hill lake meadow village inn stable workshop gate tower wall road square fountain cave beach island farm cottage
        pond valley kitchen cellar attic theatre museum post_office bank castle temple bay canal
        | ferry playground quarry pier palace stream vineyard windmill warehouse courtyard greenhouse cliff
        | foundry abbey tavern marsh brewery boathouse smithy crossroads thicket""",
    "placeadj": """old quiet busy empty dark sunny lonely crowded narrow muddy little green cold famous ruined new
        | ancient sleepy windy shabby | deserted leafy bustling mossy""",
    "role": """baker miller tailor farmer sailor teacher doctor painter potter weaver hunter fisher shepherd gardener
        carpenter singer dancer driver cook clerk porter printer mason guard nurse judge writer barber butcher soldier
        | piper cobbler dentist juggler actor ferryman mayor plumber
        | thatcher fiddler beekeeper saddler cooper glazier""",
    "trait": """kind clever brave gentle honest patient stubborn cheerful shy proud lazy careful curious polite quiet
        friendly foolish generous serious strong thoughtful greedy wise young | bossy modest reckless lively dreamy
        | thrifty bashful loyal witty boastful""",
    "mood": """happy sad angry tired afraid worried glad hopeful lonely nervous calm bored surprised sorry hungry sleepy
        puzzled pleased upset jealous content grateful | cross ashamed excited relieved miserable
        | anxious delighted gloomy startled weary""",
    "adv": """slowly quickly quietly carefully gently happily sadly softly loudly suddenly calmly bravely kindly \
politely
        proudly nervously eagerly warmly coldly firmly wisely neatly gladly patiently | cheerfully angrily lazily
        clumsily boldly wearily | hastily timidly sternly merrily gravely""",
    "say": """say answer whisper reply add explain call shout cry promise mutter laugh sigh | announce insist declare
        | murmur grumble exclaim""",
    "move": """walk run hurry march ride climb wander drive sail travel creep rush | stroll race gallop crawl
        | trudge stumble scurry""",
    "work": """mend polish carry wrap clean paint hide lift borrow wash hold drop fix bring show open measure keep move
        admire touch push pull shake watch | weigh inspect decorate clutch sketch | repair examine scrub adjust""",
    "animal": """fox hen goat horse cat dog mouse sheep cow duck goose rabbit frog pig donkey bear wolf owl crow swan
        squirrel hedgehog turtle mole deer | tiger parrot otter pony lizard peacock camel spider
        | badger weasel heron hare magpie beaver""",
    "animaladj": """small old hungry clever lazy young brown grey white black fat thin proud shy noisy wild lame
        | spotted plump fierce | scruffy nimble sly""",
    "fruit": "apple pear plum cherry lemon grape peach orange berry melon | banana fig apricot | quince mango",
    "vegetable": """carrot onion potato turnip bean pea cabbage leek tomato pumpkin | cucumber radish
        | parsnip lentil""",
    "staple": """flour butter milk sugar salt honey cream rice oil vinegar yeast oatmeal cheese water
        | cinnamon ginger cocoa | nutmeg molasses treacle""",
    "dish": """soup bread pie stew cake porridge pudding salad pancake dumpling omelette biscuit
        | muffin waffle jam | custard chowder flapjack crumpet""",
    "taste": """sweet warm fresh salty sour plain thick spicy crisp soft hot | bitter juicy creamy
        | tangy buttery fragrant""",
    "weather": """rain snow wind fog sunshine frost thunder hail mist cloud storm drizzle heat | sleet ice
        | haze gale""",
    "skyadj": "grey blue clear dark pale heavy bright low red cold warm | milky dull | leaden hazy",
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday | |",
    "month": "January February March April May June July August September October November December | |",
    "season": "spring summer autumn winter | |",
    "daypart": "morning afternoon evening night | |",
    "meal": "breakfast lunch dinner supper tea | |",
    "n": "two three four five six seven eight nine ten eleven twelve | fifteen twenty | thirteen sixteen",
    "hour": "two three four five six seven eight nine ten eleven | |",
    "unit": "cup spoon bowl handful jug | pinch | ladle scoop",
    "spot": """table bed chair shelf window door stove chest bench basket desk stairs cupboard roof fence hedge tree
        | sofa wardrobe ladder | hearth mantel dresser trough""",
    "tree": "oak pine birch willow elm maple apple_tree | poplar cedar | rowan alder hawthorn",
    "flower": "rose lily tulip daisy violet poppy | orchid jasmine | marigold foxglove",
    "part": """handle lid edge side bottom top back corner lock hinge | strap label | rim clasp""",
    "feeling": """joy fear anger hope love pride shame courage luck patience trust | envy comfort
        | sorrow mercy""",
    "game": "chess cards hide_and_seek tag football marbles | skittles bowls | dominoes hopscotch",
    "subject": """history music numbers spelling drawing reading stars maps | chemistry poetry
        | geometry botany""",
    "vehicle": "cart boat wagon train coach bicycle ship | sleigh tram | barge canoe",
    "noise": """bang cry knock song whistle roar splash crack laugh | rattle squeak
        | rumble clatter""",
    "town1": """ash brook clay elm fair glen hart kings lang mill north oak pen red stan wood wal win | hol marl
        | thorn birk""",
    "town2": "ford ham ton bury ley field mouth bridge worth stead by well | combe wick | mere dale",
    "fname": """Mira Anna Clara Rosa Nora Ella Lucy Alice Emma Julia Sara Ida Grace Hazel Ruth Stella Vera Wanda Tessa
        Olive Maud Leona Kate Jane Irene | Hanna Flora Edith Daisy Celia Bella Agnes | Greta Ottilie Sybil Petra Bridget
        Winifred""",
    "mname": """Tom Jack Peter Oscar Hugo Felix Simon David Martin Henry Arthur Ben Carl Edgar Frank George Harold Ivan
        Leo Max Noah Otto Paul Ralph Sam | Tobias Victor Walter Albert Conrad Dennis | Rupert Ambrose Quentin Barnaby
        Gilbert Lionel""",
    # Facts a model may know, as key=value.
    "colorof": """snow=white coal=black grass=green blood=red a_lemon=yellow a_carrot=orange the_sky=blue a_crow=black
        a_swan=white a_frog=green milk=white a_cherry=red honey=golden chocolate=brown a_plum=purple ash=grey | |""",
    "opposite": """hot=cold big=small old=young fast=slow wet=dry dark=light early=late loud=quiet hard=soft full=empty
        open=closed happy=sad heavy=light clean=dirty high=low rich=poor strong=weak long=short near=far up=down | |""",
    "sound": """cow=moo sheep=baa duck=quack cat=meow dog=bark horse=neigh owl=hoot frog=croak pig=oink wolf=howl
        mouse=squeak lion=roar bee=buzz crow=caw | |""",
    "use": """hammer=drive_nails broom=sweep_the_floor kettle=boil_water needle=sew_cloth knife=cut_bread
        spoon=stir_soup lamp=light_a_room umbrella=stay_dry key=open_a_lock ladder=climb_high map=find_the_way
        bucket=carry_water pencil=write_words bell=call_people clock=tell_the_time comb=tidy_hair shovel=dig_holes
        net=catch_fish saw=cut_wood rope=tie_things oven=bake_bread | |""",
    "maker": """bread=baker coats=tailor pots=potter chairs=carpenter flour=miller pictures=painter cloth=weaver
        walls=mason stories=writer songs=singer meals=cook books=printer | |""",
    "home": """bee=hive bird=nest dog=kennel horse=stable rabbit=burrow bear=cave cow=barn fish=water spider=web
        pig=sty ant=hill | |""",
    "young": """dog=puppy cat=kitten cow=calf sheep=lamb horse=foal hen=chick duck=duckling bear=cub goat=kid
        goose=gosling frog=tadpole deer=fawn | |""",
}

# Long tails: more words of the training split.  They are rare one by one, and together they keep a model from being
# sure that it has seen every word there is.
_TAILS = {
    "thing": """
        anchor apron armchair arrow axe badge bandage barrel bead binder blade bolt bracket bugle bundle
        calendar camera candlestick canvas carpet casket chalk charm chest churn cork crayon cricket_bat crutch
        cymbal earring easel egg_cup eyeglass fan faucet flask fossil funnel gem globe gong hairpin hammock
        handkerchief harp harness helmet hinge hook horseshoe jewel keyhole knapsack label lens lever magnet
        mallet mattress mousetrap napkin necklace nail package pan paintbrush peg penknife piano pin pipe plank
        plough pump puppet puzzle quill rattle ring_box rocket rod rucksack sandal saucepan saucer sawhorse
        scale scroll seal shield shoelace sieve skate skewer slate slipper snare spindle stocking strainer
        string suitcase sundial swing tablet tackle tassel tent thermometer thread toolbox towel trap tripod
        veil wand weathercock wheelbarrow wig windowpane wreath yoke zither
        """,
    "place": """
        alley arch bakehouse balcony barracks basin bazaar bluff bog booth bower camp campsite canyon cathedral
        churchyard circus clearing clinic cloister coast college convent corridor cove dairy dam dock dune
        estate factory forge fort gallery glade grove gully hall hamlet heath hospital hut inlet jail jetty
        junction kiln lagoon landing laundry lawn ledge lodge manor maze monastery moor mine nursery office park
        parlour pass path pavilion plain plaza porch port prairie ranch ravine reef reservoir ridge rink sawmill
        shed shop shore shrine spring stage street suburb summit swamp tannery terrace track tunnel waterfall
        well wharf yard zoo
        """,
    "role": """
        archer archivist astronomer banker baron beggar blacksmith bricklayer builder butler captain caretaker
        carter chemist collector composer conductor constable courier cowherd critic curator dyer editor
        engineer explorer falconer fireman florist forester gambler geologist glassblower goldsmith governor
        grocer guide harper healer hermit historian hostess inventor jailer jeweller joiner king knight lawyer
        librarian locksmith logger magician maid manager merchant messenger midwife milkmaid minister monk
        musician navigator nun officer organist orphan pharmacist philosopher pilgrim pilot pirate poet postman
        priest prince princess professor queen ranger roofer sculptor seamstress secretary senator servant
        sheriff shoemaker smith spinner squire steward student surgeon surveyor tanner tinker trader traveller
        trumpeter tutor usher vet waiter warden watchman woodcutter
        """,
    "trait": """
        absent-minded ambitious awkward blunt charming clumsy cunning daring decent devoted eager earnest
        fearless fickle forgetful frank fussy glum graceful grim grumpy gullible hardy humble idle impatient
        jolly keen lenient meek merry mild naive nosy obedient odd open-hearted plucky practical pious
        quarrelsome rash rude sensible selfish shrewd skilful slow-witted sober solemn spiteful stern strict
        stingy talkative tender tidy unlucky vain
        """,
    "mood": """
        alarmed amazed amused annoyed bewildered bitter breathless careless cheered comfortable confused curious
        desperate determined disappointed dizzy downcast drowsy ecstatic embarrassed encouraged enchanted
        exhausted faint frantic frightened furious guilty heartbroken helpless homesick hurt impressed
        indifferent irritable jubilant moved numb offended overjoyed peaceful pensive refreshed relaxed
        resentful restless satisfied scared shaken sheepish shocked silent speechless suspicious tense terrified
        thankful thirsty thrilled troubled uneasy wistful wretched
        """,
    "adv": """
        absently awkwardly barely blindly briefly brightly briskly busily casually cautiously cleverly dearly
        deeply doubtfully dreamily evenly fairly faithfully fiercely fondly freely fully generously gracefully
        greedily grimly harshly heavily helplessly hopefully hurriedly idly innocently instantly keenly lightly
        meekly mildly modestly nearly nicely oddly openly painfully plainly promptly rapidly readily roughly
        rudely safely secretly selfishly sharply shyly silently smoothly solemnly stiffly stubbornly sweetly
        swiftly tenderly thoroughly tightly truly wildly willingly
        """,
    "work": """
        bend bury chase collect compare cover crush deliver dry empty fasten fill fold frame gather grease guard
        hammer hang heat invent join knit label load lock loosen mark melt mention notice order pack paste pinch
        plant pluck point press protect pull_out punish raise refuse remember remove rescue return roll rub ruin
        sand save scratch search select shape sharpen smash smell soak sort split squeeze stack stain stamp
        steady stitch store strip study stuff swap tap taste tear_up tie trace trade trim turn twist unlock
        unpack untie use varnish waste wind_up wipe wrap_up
        """,
    "move": """
        amble bolt bounce canter charge circle crouch dance dart dash drift flee float glide hike hobble hop
        hover jog jump leap limp lurch paddle pace pedal pounce prowl return roam row rove saunter skate skip
        slide sneak speed splash sprint stamp steer step stride swagger swerve swing swoop tiptoe tramp tread
        trot tumble turn veer venture wade waddle whirl zigzag
        """,
    "animal": """
        adder alligator ant antelope ape baboon bat bee beetle bison boar buffalo bull butterfly buzzard calf
        canary caterpillar centipede cheetah chicken cobra cockerel cod colt crab cricket crocodile cuckoo
        dolphin dove dragonfly eagle eel elephant falcon ferret finch firefly flamingo flea gazelle gecko gnat
        gorilla grasshopper gull hamster hawk hippo hornet hound jackal jay kangaroo kingfisher kitten koala
        lamb lark leopard lion lobster lynx mackerel mammoth marten mosquito moth mule newt nightingale ostrich
        ox oyster panda panther partridge pelican penguin pheasant pigeon pike puffin python quail raccoon ram
        rat raven robin rooster salmon seal shark shrimp skunk snail snake sparrow spaniel starling stork
        swallow tadpole terrier thrush toad trout tuna viper vulture walrus wasp whale wombat woodpecker worm
        wren yak zebra
        """,
    "look": """
        bare blunt brittle burnt charred chipped cheap clear coarse crumpled damp dark deep elegant empty
        enchanted faded fancy fine flat flimsy fragile frayed fresh frozen glossy grand greasy greenish grimy
        hard hollow hot jagged loose mended mouldy muddy neat numbered odd oily open pale patched perfect
        pointed precious quaint ragged rare raw ripped rotten sharp silky slippery soft solid spare splendid
        stained sticky stiff sturdy thick thin torn twisted ugly unlit useful useless wet worn wrinkled
        """,
    "weather": """
        blizzard breeze cloudburst dew downpour dust flood heatwave lightning monsoon moonlight rainbow shade
        shower slush smoke squall starlight steam sunlight thaw twilight whirlwind
        """,
    "say": """
        advise agree argue assure beg boast bellow brag chuckle claim comment complain confess cough demand echo
        gasp giggle groan growl grunt hiss hint howl joke moan nod object observe plead pray protest recall
        recite remark report roar scold scream shriek snap snarl sneer sniff sob squeal stammer suggest swear
        tease thunder wail warn wheeze whine yawn yell
        """,
    "dish": """
        bagel broth bun cheesecake chutney cracker crust curry fudge gingerbread goulash gravy hotpot lasagna
        loaf macaroni marmalade meatball noodle pasta pastry pickle pizza pretzel roast roll sandwich sauce
        sausage scone stuffing tart toast trifle turnover wafer
        """,
    "spot": """
        armoire banister barrel beam bookcase bunk counter couch crib curtain doorstep fireplace floor gatepost
        ledge log mattress mantelpiece pillar post railing rock sideboard sill sink stump tub wall washstand
        woodpile
        """,
    "feeling": """
        ambition anxiety boredom charity curiosity despair disgust doubt duty faith freedom friendship
        gratitude greed grief guilt honour humour innocence justice kindness laziness loneliness longing loyalty
        melancholy memory peace pity regret revenge respect sadness silence sympathy wisdom wonder
        """,
    "noise": """
        bark bell boom buzz clang clap click creak crunch echo fizz groan growl gurgle hiss howl hum jingle moan
        patter peal pop purr rustle scream scrape screech shriek sigh sizzle slam snap sneeze snore sob squeal
        squelch thud thump tick tinkle wail whimper whisper yell
        """,
    "part": """
        arm blade button buckle centre clip crank curve end face flap foot frame front hook hole joint knob
        latch leg lining mouth neck nose peg pin point seam shaft spring stem surface tail tip
        """,
    "flower": """
        anemone aster begonia bluebell buttercup camellia carnation clover cornflower crocus daffodil dahlia
        geranium heather hollyhock hyacinth iris lavender lilac magnolia pansy peony petunia primrose snowdrop
        sunflower thistle
        """,
    "tree": """
        acacia ash beech cherry_tree chestnut cypress fir hazel holly juniper larch lime linden olive_tree palm
        pear_tree plane redwood spruce sycamore walnut yew
        """,
}

# The adjectives a noun of this sort may carry, in English order (size, look, colour, material).
_ADJECTIVES = {
    "thing": ("size", "look", "colour", "material"),
    "place": ("placeadj",),
    "animal": ("animaladj",),
    "dish": ("taste",),
    "fruit": ("taste",),
    "vegetable": ("taste",),
    "spot": ("look",),
    "tree": ("size",),
    "flower": ("colour",),
    "vehicle": ("look", "colour"),
}

# Names from syllables: start + (middle) + an ending that tells the gender.
_NAME_START = """b d f g h j k l m n p r s t v w z bl br cl dr fl gr kl kr pl pr sl st tr th sh ch""".split()
_NAME_VOWEL = "a e i o u".split()
_NAME_MIDDLE = "l r n m d v s t ll rr nn mm nd ld rt st lv rn sk lm".split()
_NAME_END = {"she": "a ia ette ina elle issa ora une".split(), "he": "o us in ard ek or ik ald".split()}
_KIN = {
    "she": "sister aunt mother cousin daughter grandmother niece",
    "he": "brother uncle father son grandfather nephew",
}
_PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
}

# ---------------------------------------------------------------------------------------------------------------------
# The grammar.  One alternative a line; training alternatives first, held-out ones below "---".

_RULES = {
    # --- phrases -----------------------------------------------------------------------------------------------------
    "when": """
        one {*skyadj} {*daypart} in {*month}
        on {*weekday} {*daypart}
        early on {*weekday}
        late one {*season} {*daypart}
        just before {*meal}
        after {*meal} on {*weekday}
        at {*hour} o'clock
        when the {*weather} had stopped
        on the {*n.th} day of {*month}
        as the {*weather} came closer
        in the middle of the {*daypart}
        during the {*weather}
        ---
        that {*weekday} {*daypart}
        in the first week of {*month}
        long before {*meal}
        by {*hour} o'clock that {*daypart}
        as soon as the {*weather} was over
        on a {*skyadj} {*season} {*daypart}
        """,
    "where": """
        near the {*place.x}
        by the {*place.x}
        behind the {*place}
        beside the {*placeadj} {*place}
        not far from the {*place.x}
        on the road to {*town}
        between the {*place} and the {*place}
        in front of the {*place.x}
        under a {*tree.x}
        at the {*place.x}
        where the {*place} meets the {*place}
        above the {*place} of {*town}
        ---
        close to the {*place.x}
        past the {*placeadj} {*place}
        a short walk from the {*place.x}
        on the far side of the {*place}
        next to the {*tree} at the {*place}
        """,
    "nook": """
        under the {*spot.x}
        behind the {*spot}
        on [top of ](the|a) {*spot.x}
        beside a {*thing.x}
        inside a {*thing.x}
        between the {*spot} and the {*spot}
        below a {*size} pile of {*thing.s}
        against the {*spot.x}
        in a {*thing.x} full of {*fruit.s}
        near the {*spot}, with a {*thing} on it
        ---
        at the back of the {*spot}
        beneath a {*thing.x}
        next to the {*spot.x}
        in the dust by the {*spot}
        """,
    "goal": """
        paint the {*place} {*colour}
        build a {*size} {*vehicle}
        (learn|write|sing) a song about (a {*animal}|{*feeling}|{*feeling})
        cross the {*place.x}
        bake a {*taste} {*dish}
        sell a {*thing.x}
        catch a {*animal.x}
        grow the best {*vegetable.s} in {*town}
        win at {*game}
        sail to {*town}
        plant a {*tree} by the {*place}
        teach the {*animal} to dance
        study {*subject} with the {*role}
        ---
        carve a {*animal} for the {*place}
        reach {*town} on foot
        beat the {*role} at {*game}
        cook a {*taste} {*dish} for the whole {*place}
        tame a {*animal.x}
        find a {*colour} {*flower}
        """,
    "trouble": """
        the {thing} had a crack in its {*part}
        the {*part} of the {thing} was loose
        the {thing} would not fit through the {*spot}
        the {*animal} had chewed the {thing}
        the {thing} was full of {*weather}
        somebody had painted the {thing} {*colour}
        the {thing} smelled of {*vegetable.s}
        the {thing} made a {*noise} like a {*animal}
        ---
        the {thing} had lost its {*part}
        a {*animal.x} was asleep on the {thing}
        the {thing} was stuck to the {*spot}
        the {*weather} had ruined the {*part} of the {thing}
        """,
    "smell": """
        it smelled of {*fruit.s} and {*weather}
        there was a {*noise} from the {*place}
        the {*season} air tasted of {*staple}
        somewhere a {*animal.x} was calling
        the light on the {*spot} was {*colour}
        the {*flower.s} by the {*spot} were {*colour}
        ---
        a {*noise} came from the {*place}
        one could smell {*flower.s} and {*dish}
        far away a {*animal} answered a {*animal}
        the {*spot.x} looked {*colour} in that light
        """,
    "saying": """
        {@} {*say.ed}
        {@} {*say.ed} {*adv}
        {*say.ed} {@}
        {@.he} {*say.ed} with a {*mood} look
        {*say.ed} the {@.role}
        {@.he} {*say.ed} {*adv}
        said {@}, who was still {*mood}
        {@} {*say.ed} before {@.he} {*move.ed} to the {*spot}
        {*say.ed} {@}, {*mood} and {*mood}
        {@} {*say.ed}, and {@.his} {*animal} looked up
        {*say.ed} {@} in a {*mood} voice
        ---
        {@} {*say.ed}, [now ]{*mood}
        {*say.ed} {@} [rather ]{*adv}
        {@.he} {*say.ed}, looking {*mood}
        the {@.role} {*say.ed}
        """,
    "gesture": """
        {@} put down the {*thing.x}.
        {@} looked at the {*thing} {*adv}.
        {@.He} rubbed {@.his} nose and {*move.ed} to the {*spot}.
        {@.He} thought of {@.his} {@.kin} and felt {*mood}.
        {@} {*work.ed} the {*part} of {@.his} {*thing}.
        for a while {@} only listened to the {*weather} {*adv}.
        {@.He} was {*mood} and a little {*mood}.
        {@} smiled at the {*animal.x} <where>.
        there was nothing {@} could do but {*work} the {*thing} again.
        once more {@.he} told {@.himself} not to be {*mood}.
        {@} took a {*fruit} from the {*spot} and ate it without a word.
        "it will be {*skyadj} soon," {@.he} told the {*animal}, which did not answer.
        long ago {@} had been a {*role}, and {@.he} had never been as {*mood} as now.
        people who did not know {@} thought that {@.he} was {*trait}.
        neither the {*weather} nor the {*noise} could make {@} {*move}.
        ---
        {@} leaned on the {*spot.x} and felt {*mood}.
        {@.He} turned the {*thing} over {*adv}.
        {@} {*move.ed} once around the {*spot}.
        {@.His} hands smelled of {*staple} and {*flower.s}.
        """,
    "scenery": """
        the sky over the {*place} was {*skyadj}, and <smell>.
        <smell>, and the {*place} was {*placeadj}.
        there was {*weather} (in the air|over {town}|all around|above the {*place}), and <smell>.
        {*n} {*animal.s} {*move.ed} {*adv} <where>.
        a {*animal.x} sat <nook> and looked {*mood}.
        nothing moved <where> but a {*animal.x} and {*n} {*animal.s}.
        that {*season} was {*skyadj}; all of {*town} talked about the {*weather}.
        if there was anybody <where>, it was only a {*role} with a {*thing}.
        one could hear a {*noise}, then another, and then {*weather} on the {*spot}.
        ---
        above the {*place} the sky had turned {*skyadj}, and <smell>.
        the {*weather} had come early, and <smell>.
        on the {*spot} {*n} {*animal.s} were waiting {*adv}.
        a {*animal.x} {*move.ed} <where>, [very ]{*mood}.
        """,
    # --- stories of a lost thing -------------------------------------------------------------------------------------
    "owner": """
        {a} was a {*trait} {a.role} who owned a {thing.x}.
        there was once a {*trait} {a.role} called {a}, and {a.he} loved {a.his} {thing.x}.
        <when>, {a} the {a.role} got a {thing.x} from {a.his} {a.kin}.
        {a} lived <where> and had a {thing.x}, a gift from a {*trait} {*role}.
        in {town} everybody knew {a}, the {*trait} {a.role} with the {thing.x}.
        the {thing.x} belonged to {a}, a {a.role} from {town}.
        {a} kept a {thing.x} <nook>, for {a.he} was a {*trait} {a.role}.
        of all the {*role.s} in {town}, only {a} had a {thing.x}.
        "this {thing.x} is the best thing I have," {a} the {a.role} used to say.
        whenever {a} went to the {*place}, {a.he} took along a {thing.x}.
        nobody was so {*trait} as {a}, the {a.role}; nobody had so {*look} a {thing}.
        ---
        no {a.role} in {town} was as {*trait} as {a}, and nobody had such a {thing.x}.
        {a}, {*trait} as {a.he} was, always carried a {thing.x}.
        the best thing that {a} the {a.role} had was a {thing.x}.
        <when>, a {*trait} {*role} sold a {thing.x} to {a}, the {a.role} of {town}.
        """,
    "loss": """
        but <when>, the {thing} was gone.
        then {a} {*move.ed} to the {place} and left the {thing} <nook>.
        <when>, {a} looked <nook>, but there was no {thing}.
        "where is my {thing}?" {a} asked {*adv}. nobody in the {place} knew.
        {*weather} came over the {place}, and afterwards {a} could not find the {thing}.
        {a} woke <when> and saw (that somebody had taken|that a {*animal} had carried off|no sign of|only an empty \
{*spot} instead of) the {thing}.
        while {a} {*work.ed} a {*thing}, the {thing} fell off the {*vehicle} and was lost.
        "it cannot be gone!" said {a}. but neither <nook> nor <nook> was there a {thing}.
        when {a} came home from the {place}, {a.he} had everything but the {thing}.
        one {*daypart} the {thing} did not hang in its place any more, and {a} felt {*mood}.
        ---
        <when>, the {thing} was missing from its place <nook>.
        between the {*place} and the {place}, {a} lost the {thing}.
        "my {thing}!" cried {a}. "it was <nook>, and now it is gone."
        {a} came back from the {place} {*mood}, and without the {thing}.
        """,
    "search": """
        {a} looked <nook> and <nook>, but found only a {*thing.x}.
        {a.He} {*move.ed} {*adv} to the {*place} and asked every {*role} about the {thing}.
        first {a.he} searched the {*place}, then the {*place.x}, and at last the {*place}.
        {a} {*work.ed} (each|every) {*thing} and (each|every) {*thing}, but (none|not one) was (the {thing}|{a.his} \
{thing}|{*look} like {a.his}).
        a {*trait} {*role} had seen a {*thing}, but no {thing}.
        {a.He} (even |)asked a {*animal.x}, (because|for) {a.he} was {*mood}[ and did not know what to do].
        {a.His} {a.kin} helped {*adv}, and together they {*work.ed} the {*spot.x}.
        "no, {a}," said the {*role}, "I have seen no {thing}." the {*role} said the same.
        for {n} hours {a} turned over every {*thing} in the house, {*mood} and {*mood}.
        between the {*place} and the {*place} {a.he} saw a {*animal}, a {*vehicle.x}, and nothing else.
        ---
        all {*daypart} {a} {*move.ed} from the {*place} to the {*place} to find the {thing}.
        {a.He} asked the {*role} and the {*role}; neither had seen the {thing}.
        <nook> there was a {*thing.x}, but {a} wanted {a.his} own {thing}.
        the {*trait} {a.kin} of {a} looked <nook>, {*adv}, and shook {a.his} head.
        """,
    "helper": """
        <when>, {a} met {b}, a {*trait} {b.role}. "why are you so {*mood}?" asked {b}.
        then {b} the {b.role} came by. "I saw a {thing} {nook2}," <saying:b>.
        {b}, who was a {b.role}, heard of it. "(look in|try|go to|did you look in) the {place2}[, {a}]," <saying:b>.
        "{a}, your {thing} is at the {place2}," said a {*trait} {b.role}. {b.His} name was {b}.
        {a} told {b} everything. {b} the {b.role} thought {*adv} and pointed to the {place2}.
        everyone had given up but {b}, a {*trait} {b.role}. "please let me help you, {a}," <saying:b>. "come to the \
{place2}."
        "have you been to the {place2}?" {b} wanted to know. {b.He} was a {b.role}, and more {*trait} than most.
        ---
        it was {b}, the {*trait} {b.role}, who came to help {a}. "try the {place2}," <saying:b>.
        "listen, {a}," <saying:b>. {b} was a {b.role} and {*trait}. "go to the {place2} and look for the {thing} there."
        near the {*place}, {a} told {b} the {b.role} about the {thing}, and {b} looked {*mood}.
        """,
    "found": """
        so {a} {*move.ed} to the {place2}, and there, <nook>, was the {thing}.
        {a} and {b} {*move.ed} to the {place2} {*adv}. the {thing} lay <nook>.
        "here it is!" {b} {*say.ed}. the {thing} had been <nook> in the {place2} all the time.
        at the {place2}, {b} {*work.ed} a {*thing} and under it found the {thing}.
        {b} had {a.his} {thing}! {b.He} had found it <nook>, and {b.he} gave it back to {a} {*adv}.
        in the {place2} a {*animal.x} was sitting on the {thing}, and {a} laughed {*adv}.
        what lay there <nook>, in the middle of the {place2}? "my {thing}!" cried {a}.
        {a} went first into the {place2}, and {b} came behind with a {*thing}; and they found the {thing} <nook>.
        ---
        they {*move.ed} to the {place2}, {a} first and {b} behind, and saw the {thing} <nook>.
        what did {a} see <nook> in the {place2}? it was the {thing}, still {*look}.
        {b} lifted a {*thing.x} in the {place2}. "is this your {thing}, {a}?" {b.he} asked.
        """,
    "thanks": """
        {a} was {*mood} again, and {a.he} gave {b} a {*dish.x}.
        "thank you, {b}," <saying:a>. "you are a {*trait} {b.role}."
        from that day {a} and {b} were friends, and the {thing} stayed <nook>.
        {a} and {b} {*move.ed} home and ate {*dish} with {*fruit.s}.
        that {*daypart} {a} put the {thing} <nook> and slept {*adv}.
        {b} would take no money for the {thing}, only a {*fruit.x} and a {*noise} of a laugh.
        since then, {a} {*work.es} the {thing} every {*weekday}, and {b} {*work.es} the {*thing}.
        "if you had not helped me, {b}, I would have lost it for ever," <saying:a>.
        {a} has told the story of the {thing} many times, and {b} never grows tired of it.
        so {a} got back the {thing}, and {b} got a {*dish.x} and {n} {*fruit.s}.
        ---
        "without you, {b}, my {thing} would be lost," <saying:a>.
        {a} baked a {*dish.x} for {b}, and the {thing} was never lost again.
        so the {thing} came home, {a} felt {*mood}, and {b} got {*n} {*fruit.s}.
        {b} and {a} still talk about that {thing} on {*weekday} {*daypart}s.
        """,
    "doc_lost": """
        <owner> <loss> <search>[ <free>] <helper> <found>[ <free>] <thanks>
        <owner>[ <scenery>] <loss> <gesture:a> <search> <helper> <found> <thanks>
        <scenery> <owner> <loss> <search> <helper>[ <gesture:b>] <found> <thanks>
        ---
        <owner> <scenery> <loss> <search> <gesture:a> <helper> <found> <thanks>
        <owner> <loss>[ <gesture:a>] <helper> <search> <found> <thanks>
        """,
    # --- a broken thing and its repair -------------------------------------------------------------------------------
    "doc_repair": """
        {a} came to {b} with a {thing.x}, because <trouble>. <bench> <gesture:b> <fixed>
        <when>, {a} the {a.role} saw that <trouble>. {a.He} {*move.ed} to {b}, a {*trait} {b.role}. <bench> <fixed>
        <scenery> {a} had a {thing.x}, but <trouble>. {a.His} {a.kin} sent {a.him} to {b}. <gesture:b> <bench> <fixed>
        "you see," said {a} to {b}, "<trouble>. please mend it for me." the {thing} was {a.his} {a.kin}'s. <gesture:b> \
<bench> <fixed>
        all the others said that one should throw the {thing.x} away, since <trouble>. only {b} took it from {a}. \
<bench> <fixed>
        ---
        "{b}, please help me," said {a} {*adv}. "you see, <trouble>." <gesture:b> <bench> <fixed>
        everyone told {a} to throw away the {thing.x}, for <trouble>. {b} the {b.role} did not. <bench> <fixed>
        """,
    "bench": """
        "what is wrong with the {thing}?" asked {b}. "I do not know," <saying:a>. "it was my {a.kin}'s {thing}."
        {b} {*work.ed} the {thing} {*adv} and asked {a} for a {thing2} and {n} {*thing.s}.
        "I need a {thing2.x}," <saying:b>. {a} {*move.ed} to the {*place} and brought back a {thing2}.
        "bring me your {thing2}, {a}," <saying:b>. "then I can mend the {thing}."
        first {b} looked at the {thing}, then at {a}, and took {n} drops of {*staple} and a {thing2.x}.
        it took {b} a while to find the {thing2}. "have patience, {a}," <saying:b>.
        ---
        {b} turned the {thing} around {n} times. "have you got a {thing2}?" {b.he} asked {a}.
        "first the {thing2}, then the {thing}," <saying:b>, and {a} {*move.ed} to get the {thing2}.
        with a {thing2.x} and {n} drops of oil, {b} {*work.ed} the {thing} {*adv}.
        """,
    "fixed": """
        by {*daypart} the {thing} was as good as new. {a} paid {n2} coins, and {b} gave back the {thing2}.
        "done!" {b} {*say.ed}. the {thing} worked, and {a} {*move.ed} home to {town} {*adv}.
        {b} used the {thing2}, and soon the {thing} was whole. "{n2} coins, {a}," <saying:b>.
        {a} {*work.ed} the {thing} and felt {*mood}. "keep the {thing2}, {b}," {a.he} {*say.ed}.
        the {thing} was better than it had ever been. it was all thanks to the {thing2}, {b} told {a}.
        after {n2} hours of work {b} gave the {thing} to {a}. "put the {thing2} away for me, please," {b.he} {*say.ed}.
        ---
        {n2} hours later {b} put away the {thing2} and gave the {thing} to {a}, who was {*mood}.
        "there is your {thing}, {a}," <saying:b>. "the {thing2} did the work." {a} paid {n2} coins.
        it took {b} {n2} days, but the {thing} was better than before, and {a} felt {*mood}.
        """,
    # --- plans, journeys, contests -----------------------------------------------------------------------------------
    "wish": """
        {a} the {a.role} wanted to {goal}.
        "one day I will {goal}," {a} told {a.his} {a.kin} {*adv}.
        <when>, {a} made up {a.his} mind to {goal}.
        {a}, a {*trait} {a.role} from {town}, had one wish: to {goal}.
        nobody believed that {a} would ever {goal}.
        people laughed at {a} because {a.he} hoped to {goal}.
        "watch and see: I am going to {goal}," said {a} to {b}.
        what {a} wished for more than all {*look} things was to {goal}.
        ---
        more than anything, {a} the {*trait} {a.role} hoped to {goal}.
        "watch me {goal}," {a} said to {b} <when>.
        all of {town} laughed when {a} said that {a.he} would {goal}.
        """,
    "advice": """
        "you are too {*trait} to {goal}," <saying:b>. {b} was {a.his} {b.kin}.
        {b} the {b.role} gave {a.him} a {thing.x}. "to {goal} you need a {thing}," <saying:b>.
        "it is hard to {goal}," said {b}, a {*trait} {b.role}. "take my {thing.x} and go to {town2}."
        "ask the {*role} in {town2}," said {b}, {*adv}. "to {goal}, one must have a {thing}."
        before {a} could begin, {b} the {b.role} gave {a.him} a {thing.x} from {town2}. "you cannot do it without \
this," <saying:b>.
        {b} did not laugh like the other {*role.s}. "buy a {thing.x} in {town2}, {a}," <saying:b>.
        ---
        {b}, a {*trait} {b.role}, did not laugh at {a}. "you cannot {goal} without a {thing.x}," <saying:b>.
        "before you {goal}, go to {town2} and buy a {thing.x}," <saying:b>. {b} was a {b.role}.
        """,
    "attempt": """
        the first time, {a} took the {thing} and failed, and {a.he} felt {*mood}.
        on {*weekday} {a} {*move.ed} to {town2} with the {thing} <nook>.
        {a} {*work.ed} the {thing} for {*n} {*daypart}s and ate nothing but {*dish}.
        it was {a.his} {*trait} {a.kin} who {*work.ed} the {thing} while {a} slept.
        {a} tried {*adv}, but a {*animal.x} got in the way.
        in the {*place.x} {a} met a {*role} who asked about the {thing}.
        {n} times {a} failed; each time {a.he} took up the {thing} again.
        along the road to {town2} {a} carried the {thing} in {a.his} hand, {*mood} but not {*mood}.
        a {*animal} ran off with the {thing}, and {a} nearly gave up.
        ---
        {n} times {a} tried with the {thing}, and each time {a.he} was more {*mood}.
        {a} {*move.ed} {*adv} along the {*place}, the {thing} in {a.his} hand.
        on the way to {town2}, a {*animal} nearly ran off with the {thing}.
        """,
    "success": """
        in {*month}, {a} did {goal}, and {b} was the first to clap.
        "you did it, {a}!" {b} {*say.ed}. and yes, {a} had managed to {goal}.
        that is how {a} came to {goal}. the {thing} now hangs <nook> in {town}.
        so {a} could {goal} after all, and {b}, who was {*mood}, asked to have the {thing} back.
        at last it was done. {a} had managed to {goal}, and "I always knew it," {b} told everyone in {town}.
        {b} heard the news in {town2}: it was not too hard for {a} to {goal} with the {thing}.
        ---
        and in the end {a} managed to {goal}. "I knew it," <saying:b>.
        {b} heard {*n} days later that {a} had gone and done it: to {goal} was not so hard with the {thing}.
        """,
    "doc_plan": """
        <wish> <advice> <attempt> <attempt> <success>
        <wish>[ <gesture:a>] <advice>[ <scenery>] <attempt> <gesture:a> <success>
        <scenery> <wish> <advice>[ <free>] <attempt>[ <free>] <success>
        ---
        <wish> <scenery> <advice> <attempt> <success>
        <wish> <advice> <gesture:a> <attempt> <attempt> <success>
        """,
    "doc_contest": """
        <when>, {town} held a contest to {goal}. {a} the {a.role} brought a {thing.x}, and {b} the {b.role} came with \
a \
{thing2.x}. <round> <round> <prize>
        three friends wanted the prize of {town}: {a}, {b} and {c}. {a} had a {thing.x}, {b} had a {thing2.x} and {c} \
had only {*dish}. <round> <prize>
        "I am better than you, {b}," <saying:a>. "with (my|a|this) {thing} I (can|could|will) win [any game ]at \
{*game}[, any {*daypart}]." "and I have my \
{thing2}," <saying:b>. <round> <round> <prize>
        ---
        who could {goal}? {a} said that {a.he} could, with a {thing.x}; {b} said the same of {b.himself} and of a \
{thing2.x}. <round> <prize>
        the {*role} of {town} promised a prize to the one who would {goal}. {a} took out the {thing.x}, {b} the \
{thing2.x}. <round> <round> <prize>
        """,
    "round": """
        at first {a} was ahead, for the {thing} was {*look}.
        then {b} used the {thing2} {*adv}, and people {*say.ed} {b.his} name: "{b}! {b}!"
        the {thing} broke at the {*part}, and {a} was {*mood}.
        {b} lost the {thing2} <nook> and had to begin again.
        a {*animal.x} ran between {a} and {b} and knocked over a {*thing}.
        ---
        for {*n} minutes {b} led with the {thing2}, and {a} looked {*mood}.
        {a} swung the {thing} {*adv}, and {b} {*move.ed} back to the {*spot}.
        {b} dropped the {thing2}, and {a} laughed {*adv}.
        """,
    "prize": """
        in the end {b} won. {a} shook {b.his} hand and gave {b.him} the {thing}.
        {a} won a {*dish.x}, and {a.he} shared it with {b} {*adv}.
        neither {a} nor {b} won: the prize, a {*thing.x}, went to {a.his} {a.kin}.
        "well done, {a}," <saying:b>. they traded: the {thing} for the {thing2}.
        ---
        the {*role} gave the prize to {a}, and {b} was {*mood} until {a} gave {b.him} half.
        it was {b} who won, thanks to the {thing2}, and {a} bought {b.him} {*dish}.
        """,
    # --- dialogue ----------------------------------------------------------------------------------------------------
    "doc_talk": """
        {a} and {b} met <where>.~<ask_a>~<reply_b>~<ask_a>~<reply_b>~<end_a>
        <when>, {a} saw {b} <where>.~<ask_a>~<reply_b>~<free>~<end_a>
        {a}, who was {*mood}, sat down beside {b} the {b.role}.~<reply_b>~<ask_a>~<reply_b>~<end_a>
        ---
        {b} the {b.role} was {*move.ing} <where>, and {a} called to {b.him}.~<ask_a>~<reply_b>~<ask_a>~<end_a>
        <when>, {a} and {b} stood <where>, both {*mood}.~<ask_a>~<reply_b>~<ask_a>~<reply_b>~<end_a>
        """,
    "ask_a": """
        "have you seen the {thing.x}, {b}?" asked {a}.
        "{b}, do you want to come to {town} with me?" <saying:a>.
        "what is the {thing} for?" {a} asked {*adv}.
        "did you {*work} my {thing}, {b}?" asked {a}. "it was <nook>."
        "tell me about the {*animal.x} at the {place}, {b}," <saying:a>.
        "why were you at the {place} on {weekday}?" {a} asked.
        "{b}, my {a.kin} wants {n} {vegetable.s}," <saying:a>.
        "who has got my {thing}, {b}?" {a} wanted to know. "how many times must I ask?"
        "will you buy {n} {vegetable.s} at the {place} for me, {b}?" <saying:a>.
        "is the {thing} still in {town}?" {a} asked. "I am looking for it, you know."
        ---
        "I am looking for the {thing}, {b}," <saying:a>. "is it still <nook>?"
        "how many {vegetable.s} did you buy in {town}, {b}?" {a} wanted to know.
        "will you go to the {place} on {weekday}, {b}?" asked {a} {*adv}.
        "{b}, who gave you that {thing.x}?" {a} asked, {*mood}.
        """,
    "reply_b": """
        "I left the {thing} <nook>, {a}," <saying:b>. "ask the {*role}."
        "{n} {vegetable.s}? I have only {n2}, {a}," <saying:b>.
        "on {weekday} I went to the {place} to {*work} a {*thing}," <saying:b>.
        "{town} is too far, {a}, and I am {*mood}," <saying:b>.
        "the {thing} is for my {b.kin}," <saying:b>. "{b.kin} likes {*look} things."
        "no, {a}, it was a {*trait} {*role} from {town}," <saying:b>.
        "look, {a}! there is {*weather} over the {place}," <saying:b>.
        "I gave it to my {b.kin}, and {b.kin} took it to the {place}, {a}," <saying:b>.
        "not today, {a}. I have to {*work} the {thing} until {weekday}," <saying:b>.
        "yes, {a}, {n} {*animal.s} and {n2} {vegetable.s}. I counted them," <saying:b>.
        ---
        "the {thing}? my {b.kin} took it to {town}, {a}," <saying:b>.
        "I bought {n} {vegetable.s} and a {*thing} at the {place}," <saying:b>.
        "not on {weekday}, {a}. that is the day I {*work} the {thing}," <saying:b>.
        "{a}, there are {n} {*animal.s} at the {place}!" <saying:b>.
        """,
    "end_a": """
        "then I will (wait for you|look for you|sit|be) (at the {place}|<where>) (on {weekday}|when the {*weather} \
stops), {b}," <saying:a>.
        {a} {*move.ed} off to {town}, and {b} {*work.ed} the {thing}.
        "good night, {b}. mind the {thing}," <saying:a>.
        "come, {b}," <saying:a>. "let us {*work} the {thing} and eat {*dish}."
        they shook hands, and {a} took the {thing} to the {place}.
        ---
        so {a} went to the {place} alone, and {b} kept the {thing}.
        "until {weekday}, then," <saying:a>. "and thank you for the {thing}, {b}."
        {b} laughed, and {a} {*move.ed} {*adv} towards {town}.
        """,
    "doc_play": """
        A scene at the {place}. {a} is a {a.role}; {b} is {a.his} {b.kin}.~{a}: <line_a>~{b}: <line_b>~{a}: <line_a>~\
{b}: <line_b>~(<exit>)
        <when>, at the {place.x}. {b} holds a {thing.x}. enter {a}.~{a}: <line_a>~{b}: <line_b>~{a}: <line_a>~{b}: \
<line_b>~<exit>
        ---
        The {place.x}, {*daypart}. {a}, a {*trait} {a.role}, finds {b} with a {thing.x}.~{a}: <line_a>~{b}: <line_b>~\
{a}: <line_a>~{b}: <line_b>~<exit>
        """,
    "line_a": """
        {b}, put that {thing} <nook>!
        I have {*move.ed} all the way from {town}, {b}, and I am {*mood}.
        is there any {dish} left? my {a.kin} ate {n} {fruit.s} and nothing else.
        that {thing} is (mine|not yours|my {a.kin}'s|the {*role}'s). (I know it by|look at|I remember) the {*colour} \
{*part}.
        who is {*move.ing} <where>? is it the {*role}?
        {b}, lend me {n} coins for the {thing}.
        ---
        what have you got there, {b}? a {thing}?
        from {town} to the {place}, and not one {fruit}! I am {*mood}, {b}.
        give me the {thing}, {b}, or I will call the {*role}.
        """,
    "line_b": """
        yours, {a}? I bought this {thing} in {town} for {n} coins.
        sit down, {a}. here is {dish} with {fruit.s}.
        I see nobody, {a}, only a {*animal.x}.
        first tell me why you are so {*mood}, {a}.
        {n} coins! for {n} (coins|{*fruit.s}) I would (sell|give|show) you the {place}[, {a}][ and my {b.kin}].
        I will {*work} it {*adv}, {a}, if you ask me {*adv}.
        ---
        it is a {thing} from {town}, {a}, and it cost {n} coins.
        hush, {a}. have some {dish} and look at the {*colour} {*part} of it.
        you are {*mood}, {a}. the {*role} is in {town} today.
        """,
    "exit": """
        {a} takes the {thing} and {*move.es} off. {b} is {*mood}.
        {b} gives the {thing} to {a}, and both {*move} to the {place}.
        they look at the {thing}. {*weather}.
        ---
        {b} hides the {thing} <nook>; {a} {*move.es} out.
        {a} laughs, {b} {*work.es} the {thing}, and it is {*daypart}.
        """,
    # --- letters, diaries, notices -----------------------------------------------------------------------------------
    "doc_letter": """
        Dear {a},~<news>[ <free>] <news> <wishme>~Your {*trait} friend,~{b}
        {town}, {n.th} of {month}~Dear {a},~<news> <news>[ <news>] <wishme>~With love,~{b}
        Dear {a},~thank you for the {thing.x}. <news> <wishme>~Your {b.kin},~{b}
        ---
        To {a} the {a.role}, in {town}~<news> <wishme> <news>~Yours, {b}
        My dear {a},~<news> <news> <wishme>~As ever, your {b.kin} {b}
        """,
    "news": """
        here in {town} we have {*weather} and {*weather}, and I am {*mood}.
        the {thing} arrived <when>, and I put it <nook>.
        {c} the {c.role} asks about you and your {thing}.
        your {a.kin} sent me {n} {fruit.s}, and I made a {*dish} with {*staple}.
        last {*weekday} {c} and I {*move.ed} to the {place} to see {*n} {*animal.s}.
        do you remember the {*trait} {*role}? {c} says that they want to {*goal}.
        I still {*work} the {thing} every {*daypart}, and it is {*look}.
        my {b.kin} has a new {*thing.x} and is very {*mood}.
        it makes me {*mood} that you ask so {*adv} about the {thing}.
        {c} came to see me in {*month} and told me a story about {n} {*animal.s}.
        if the {*weather} does not stop, {c} and I will never {*goal}.
        ---
        you ask about the {thing}: it stands <nook>, and {c} likes to {*work} it.
        {town} is {*placeadj} in {*month}, and the {*weather} makes me {*mood}.
        {c} came by with {n} {fruit.s} and a story about a {*animal.x}.
        we hope to {*goal} before the {*season}, {c} and I.
        """,
    "wishme": """
        please write soon, {a}, and tell me (if you still have|about|who has|what became of) the {*thing}.
        come and see us at the {place}, {a}, and bring {n} {vegetable.s}.
        {c} (says hello|sends {*fruit.s}|sends a {*thing}) to you(, {a}, | )and (to |)your {a.kin}.
        I would be {*mood} if you came in {*month}, {a}.
        ---
        when will you come to the {place}, {a}? {c} asks it every {*weekday}.
        bring your {a.kin}, {a}, and a {*thing.x} for {c}.
        """,
    "doc_diary": """
        {weekday}, {n.th} of {month}. <me>[ <free>]~{weekday2}. <me>[ <free>] <me>
        {weekday}. {*weather} and {*weather}. {a} came with a {thing.x}. <me>~{weekday2}. <me> <me>
        ---
        {month}, {weekday}. {a} the {a.role} left a {thing.x} here. <me>~{weekday2}. <me> <me>
        """,
    "me": """
        I {*work.ed} the {thing} and thought of {a}.
        {a} {*move.ed} in <when>, {*mood} as always, and asked for {dish}.
        went to the {*place.x} with {a}, who wants to {goal}.
        no word from {b}. the {thing} is still <nook>.
        {b} wrote that {b.he} has {n} {*animal.s} and that {a} must not {goal}.
        ate {dish} with {*staple}; felt {*mood}.
        saw a {*animal.x} <where> and told {b} about it.
        {a} can speak of nothing else: {a.he} wants to {goal}, {a.he} must {goal}.
        hid the {thing} <nook>, so that {b} would not find it; {b} found it.
        made {dish} for the {*role}. {a} only looked at it, {*mood}.
        ---
        {a} talks of nothing but how to {goal}.
        put the {thing} <nook>, where {b} will find it.
        cooked {dish} for {a} and {b}; {b} was {*mood}, {a} only {*mood}.
        """,
    "doc_notice": """
        LOST: a {thing.x}, <where>, on {weekday} {*daypart}. it has a {*colour} {*part}. whoever finds the {thing} \
gets \
{n} {fruit.s} from {a}, {a.role}, {town}.
        FOR SALE: {n} {*thing.s}, one {thing.x} and a {*vehicle.x}. ask for {a} <where>. the {thing} costs {n2} coins, \
and {a} will not take less.
        NEWS FROM {town}. <when>, {a} the {a.role} found a {thing.x} <nook>. "I was {*mood}," <saying:a>. the {thing} \
will stay at the {place} until {weekday}. {b}, who lost a {thing2}, says that the {thing} is not {b.his}.
        WANTED: a {*trait} {*role} to {goal}. {n} coins (a day|a week|an hour) and {dish}. (come to|be at) the {place} \
on {weekday}[ {*daypart}] and (ask for|speak to|see) \
{a} or for {a.his} {a.kin} {b}. those who cannot {goal} need not come.
        NEWS FROM {town}. {a}, a {*trait} {a.role}, will try to {goal} on {weekday}. {b} from the {place} thinks that \
{a} is too {*trait}. "{a} could not {goal} in {*n} years," <saying:b>.
        ---
        FOUND at the {place}, <where>: a {thing.x} with a {*colour} {*part}. the owner may get the {thing} from {a}, \
{a.role}, for {n} coins. bring {weekday}'s paper.
        {town} NEWS. people at the {place} say that {a} wants to {goal}. {b}, the {*trait} {b.role}, heard it <when>. \
"if {a} can {goal}, so can I," <saying:b>.
        {town} NEWS. a {thing.x} was stolen from the {place} on {weekday}. {a} the {a.role} saw {b} with a {thing}, \
but \
{b} says: "my {thing} is {*colour}." {a} is {*mood}.
        """,
    # --- facts, questions, lists -------------------------------------------------------------------------------------
    "doc_facts": """
        {a} is a {a.role} from {town}. {a.He} is {trait} and has a {animal.x} and a {thing.x}. on {weekday.s} {a} eats \
{dish}, and then {a.he} {*move.es} to the {place}.~<quiz>~<quiz2>~<quiz3>
        {a} and {b} live in {town}. {a}, who is a {a.role}, owns {n} {animal.s}; {b}, a {trait} {b.role}, owns a \
{thing.x}\
. every {weekday} they meet at the {place} and eat {dish}.~<quiz>~<quiz3>~<quiz2>
        the {place} of {town} belongs to {a}, a {trait} {a.role}. a {animal.x} lives there, and {a} keeps a {thing.x} \
<nook>. people come on {weekday} for the {dish}.~<quiz2>~<quiz3>~<quiz>
        ---
        in {town}, {a} the {a.role} is known as {trait}. the {animal} that {a.he} keeps sleeps on a {thing.x}, and on \
{weekday} {a} brings {dish} to the {place}.~<quiz>~<quiz2>~<quiz3>
        meet {a}, {a.role} at the {place} in {town}: {trait}, fond of {dish}, and proud of a {thing.x}. since \
{weekday} \
{a.he} also has a {animal.x}.~<quiz3>~<quiz>~<quiz2>
        """,
    "quiz": """
        Question: (where does|in what town does|where, then, does) {a} live? Answer: ({a}|{a.he}|this {a.role}) lives \
in {town}.
        Question: what (does {a} do|is {a}|is {a.his} work)? Answer: ({a} is|{a.he} is|{a}, I think, is) a {a.role}.
        Question: is {a} a {a.role} or a {role2}? Answer: ({a} is|{a.he} is) a {a.role}, not a {role2}.
        Question: who (is the {a.role}|works as a {a.role}|is the {a.role} of {town})? Answer: (it is|that is|the \
{a.role} is|they mean) {a}.
        ---
        Question: in which town do we find {a}? Answer: in {town}.
        Question: what is the work of {a}? Answer: {a} works as a {a.role}.
        """,
    "quiz2": """
        Question: what is the {thing} (like|they have|in the text|we read about)? Answer: (it is|that is|it must \
be|they have) a {thing.x}.
        Question: who (has|owns|could show us) a {thing}, {a} or {role2.s} in {town2}? Answer: (not the {role2.s}, but \
{a}|it is {a}, or a friend of {a}|{a}, in {town}).
        Question: which animal (is it|belongs to {a}|does {a} keep|lives with {a}|is with {a}), a {animal} or a \
{*animal}? Answer: (a|it is a|{a} has a) {animal}.
        Question: (is anybody {trait}|is there someone {trait}|can one find anybody {trait}) (there|in {town}|here)? \
Answer: yes, (somebody|one person|someone) in {town} is {trait}.
        ---
        Question: what kind of {thing} is it? Answer: a {thing.x}.
        Question: what animal do they speak of? Answer: of a {animal}.
        """,
    "quiz3": """
        Question: (on which day|when|on what day of the week) (is there|do they have|can one get|does {a} eat) {dish}? \
Answer: (on|it is on|every|always on) {weekday}.
        Question: what (do people|does {a}|do they|can one|do friends of {a}) eat (there|in {town}|on {weekday})? \
Answer: (they eat|it is|people have|{a} eats) {dish}.
        Question: is it {dish} or {dish2} that they eat (on {weekday}|in {town})? Answer: (it is|they eat|people eat) \
{dish}, not {dish2}.
        Question: (where is the {dish}|where can {*role.s} find {dish}|where should we go for {dish})? Answer: (go \
to|at|it is at|one finds it at) the {place} (in|of) {town}.
        ---
        Question: when do they have {dish}? Answer: every {weekday}.
        Question: which food is named? Answer: {dish}, at the {place}.
        """,
    "doc_recipe": """
        {dish.x} with {fruit.s} (from {a}, {a.role})~- {n} {unit.s} of {staple}~- {n2} {fruit.s}~- one {unit2} of \
{staple2}~\
<step1> <step2> <step3>
        how {a} makes {dish}: take {n} {unit.s} of {staple}, {n2} {fruit.s} and a {unit2} of {staple2}. <step1> \
<step2> \
<step3>
        ---
        a {dish} in the manner of {a} from {town}~you need {n} {unit.s} of {staple}, {n2} {fruit.s}, and {staple2} by \
the {unit2}. <step1> <step2> <step3>
        """,
    "step1": """
        cut the {n2} {fruit.s} and put them in a {thing.x}.
        first warm the {staple} in a {thing} <nook>, then add the {fruit.s}.
        mix the {staple} and the {staple2} {*adv} with a {thing.x}.
        wash the {fruit.s} {*adv}; {a} does it in a {thing.x}.
        ---
        begin with the {fruit.s}: all {n2} go into a {thing.x}.
        pour the {staple} over the {n2} {fruit.s} in the {thing.x}, {*adv}.
        """,
    "step2": """
        add the {staple2} and stir {*n} times, {*adv}, until it is {*taste}.
        let the {thing} stand <nook> for {n3} hours.
        when the {staple} is {*colour}, put in one {unit2} of {staple2}.
        leave it by the {*spot} for {n3} minutes; it should smell {*taste}.
        ---
        stir the {thing} for {n3} minutes, and let the {staple2} fall in {*adv}.
        wait {n3} hours, until the {staple} in the {thing} turns {*colour}.
        """,
    "step3": """
        bake the {dish} for {n3} minutes and eat it {*taste}, with {*staple}.
        {a} serves the {dish} on {*weekday.s}, with a {*fruit.x}.
        take the {dish} out of the {thing} {*adv}. it feeds {*n} people or one {*animal.x}.
        if the {dish} is too {*taste}, add {staple}. {a} always does.
        ---
        after {n3} minutes the {dish} is {*taste} and done; {a} gives it to {a.his} {a.kin} first.
        cut the {dish} into {*n} parts. {a} likes it with {*staple}.
        """,
    "doc_weather": """
        Weather for {town}, {weekday}. <front> <front> <outlook>
        The weather in {month}: <front> <outlook> <outlook>
        {a} at the {place} in {town} reports {weather} on {weekday}. <front> <outlook>
        ---
        From the {place} of {town}, for {weekday}: <front> <outlook> <front>
        {weekday}'s sky, as seen by {a} in {town}. <front> <front> <outlook>
        """,
    "front": """
        in the {*daypart} there will be {weather} over {town}, and later {weather2} <where>.
        the {weather} that came from {town2} on {*weekday} will reach the {place} by {*hour} o'clock.
        {weather2} is likely <where>, so {a} the {a.role} will stay at home in {town}.
        it will be {*skyadj} in {town} but {skyadj} in {town2}.
        first comes {weather}, then {weather2}; {town} will see no sun before {*meal}.
        people at the {place} say that {town2} gets {weather} after {*hour} o'clock.
        ---
        {town} gets {weather} first, and {town2} gets {weather2} after {*hour} o'clock.
        no {weather} at the {place} before {*meal}; {town2} will be {skyadj}.
        """,
    "outlook": """
        take a {*thing} with you, says {a}, for {weather} is {*adv} on its way.
        if you {*move} to {town2}, look out for {weather2} and {*animal.s}.
        after the {weather}, {town} can hope for {*weather} and a {*skyadj} sky.
        the {weather2} of {*month} was worse, {a} {*say.es}; then it ruined {n} {*thing.s}.
        ---
        {a}, who has seen {n} years of {weather}, is {*mood} about it.
        people in {town2} should put each {*thing} indoors before the {weather2}.
        """,
    "doc_market": """
        (<when>, {a}|{a} the {a.role}|{a}) went to (the market of {town}|{town}|the {place}) and bought {n} {fruit.s}, \
{n2} {vegetable.s} and a {thing.x}. <deal> {a.His} \
{a.kin} asked: "what have you got, {a}?" "{n} {fruit.s}, {n2} {vegetable.s} and a {thing}," <saying:a>. <after>
        from {b} the {b.role}, {a} got a {thing.x} for {n} {fruit.s} and {n2} coins. <deal> at home {a.he} counted: \
{n2} coins less, {n} {fruit.s} less, one {thing} more. <after>
        ---
        {a} needed {n} {fruit.s} and {n2} {vegetable.s}, and {b} the {b.role} had them, along with a {thing.x}. <deal> \
so home went {a}, with the {n} {fruit.s}, the {n2} {vegetable.s} and, yes, the {thing}. <after>
        on the stall of {b} lay {n} {fruit.s} beside a {thing.x}. "all {n} of them, and the {thing}," <saying:a>. \
<deal> \
<after>
        """,
    "deal": """
        "that {thing} is {*look}," <saying:b>. "(you may have it|it is yours|take it[, {a},]|I sell it) for {n3} \
(coins|{*fruit.s})[, {a}]."
        {b}, who sold the {vegetable.s}, was {*trait} and gave {a.him} one {fruit} more.
        "how much for the {thing}, {b}?" "{n3} coins." "I have only {n4}," <saying:a>.
        ---
        "{n3} coins for the {thing}, {a}, since you are {*trait}," <saying:b>.
        {a} offered {n4} coins; {b} wanted {n3}; the {*animal} of {b} looked {*mood}.
        """,
    "after": """
        then the {fruit.s} went into a {dish}, and the {thing} went <nook>.
        the {thing} is still <nook>, but the {fruit.s} are gone.
        {b} never saw the {thing} again, and was {*mood}.
        {a} gave the {thing} to {a.his} {a.kin}, who {*work.ed} it {*adv}.
        ---
        {a} put the {thing} <nook> and ate the {fruit.s} with {*staple}.
        of the {n} {fruit.s} a {*animal} took one; of the {thing} it took nothing.
        """,
    # --- descriptions, fables, riddles, how-to -----------------------------------------------------------------------
    "doc_room": """
        the house of {a} stands <where>. <inside>[ <free>] <inside> <inside> <inside2>
        when you come into the {place.x}, you see <where> a {thing.x}. <inside> <inside> <inside2>
        {a} the {a.role} has one room in {town}. <inside> <inside2> <inside>
        ---
        nobody but {a} goes to the {place.x}. <inside> <inside2> <inside>
        this is the room of {a}, a {*trait} {a.role}. <inside> <inside> <inside2>
        """,
    "inside": """
        <nook> there is a {thing.x}, and beside the {thing} sleeps a {animal.x}.
        a {*thing.x} hangs <nook>, a present from {b}.
        the {*spot.x} is covered with {*flower.s}, {*thing.s} and {*fruit.s}.
        {b} painted the {*spot} {*colour}, because {a} likes {*colour} things.
        <smell>, and the {animal} {*move.es} {*adv} to the {*spot}.
        on {*weekday} {b} comes to {*work} the {thing} and to feed the {animal}.
        nobody may {*work} the {thing} but {a}; the {animal} may sleep on it.
        {b} once left a {*thing.x} <nook>, and it still lies there.
        ---
        a {thing.x} stands <nook>, where the {animal} can see it.
        {b} once gave {a} a {*thing.x}, and it lies <nook>.
        the {animal}, {*animaladj} and {*mood}, sleeps <nook>.
        """,
    "inside2": """
        that is how {a} wants it, and {b} says nothing.
        without the {thing}, {a} would feel {*mood} there.
        "one day the {animal} will break the {thing}," {b} {*say.es}.
        ---
        {a} could not live without the {animal}, nor {b} without {*dish}.
        if the {thing} ever fell, the {animal} would {*move} to the {*place}.
        """,
    "doc_fable": """
        a {animal.x} called {a} and a {animal2.x} called {b} lived <where>. <quarrel> <trick> <moral>
        <when>, {a} the {animal} found a {thing.x} <nook>. "give it to me," <say_animal>. <quarrel> <trick> <moral>
        {a} was a {animal.x} who wanted to {goal}. {b}, a {animal2.x}, laughed {*adv}. <quarrel> <trick> <moral>
        ---
        between the {*place} and the {*place} lived {a} the {animal} and {b} the {animal2}, who shared a {thing.x}. \
<quarrel> <trick> <moral>
        no {animal} was as {*trait} as {a}, and no {animal2} as {*mood} as {b}. <quarrel> <trick> <moral>
        """,
    "say_animal": """
        {*say.ed} {b} the {animal2}
        {b} the {animal2} {*say.ed} {*adv}
        ---
        the {animal2} {*say.ed} to the {animal}
        {*say.ed} {b}, for {b.he} was a {animal2}
        """,
    "quarrel": """
        "a {animal} needs no {thing}," <say_animal>. {a} the {animal} was {*mood}.
        (both of them|{a} and {b} both|they both) wanted the {thing}, the {animal} to {*work} it and the {animal2} to \
(sleep on|{*work}|sell|sit on) it.
        the {animal} took the {thing} in {a.his} mouth and {*move.ed} to the {place}, and the {animal2} {*move.ed} \
after \
{a.him}.
        "whoever brings me {n} {fruit.s} may keep the {thing}," <say_animal>.
        ---
        "I saw the {thing} first," <say_animal>, and {a} the {animal} looked {*mood}.
        the {animal} hid the {thing} at the {place}, and {b} the {animal2} smelled it {*adv}.
        """,
    "trick": """
        while {a} was looking for {fruit.s}, {b} {*work.ed} the {thing} and hid it <nook>.
        "there is a {*role} at the {place}!" {*say.ed} {a}. {b} {*move.ed} off, and {a} had the {thing} for {a.himself}.
        {b} gave {a} a {*thing} and said (that it was|it was|"here is") the {thing}[, {*adv}]; but (the {animal}|{a}) \
was (not so foolish|too {*trait}|no fool).
        then {*weather} came, and (the {thing} was|there was only the {thing} as) (the one|a) {*look} place for {a} \
(and for|and) {b}.
        ---
        {a} ate {n} {fruit.s} and told {b} that a {*animal} had the {thing}.
        in the {*weather}, {b} could not see the {thing}, and it fell on the {animal}.
        """,
    "moral": """
        "next time we share," {a} {*say.ed}. the {animal} and the {animal2} have {*work.ed} the {thing} together since \
then.
        and so the {thing} belonged to nobody, because {a} had too much {*feeling} and {b} too little {*feeling}.
        a {*look} {thing} is worth less (than {b}|to {a} than a friend), even if {b} is (only |)a {*animaladj} \
{animal2}.
        what became of the {thing}? some {*role} in {town} has it, and (the {animal}|{a}) does not {*work} things any \
more.
        "keep it, {b}," said {a} at last. "I would rather have a {*fruit} and a {*trait} friend."
        the {animal} learned {*feeling} that day, and the {animal2} learned {*feeling}.
        ---
        there is more {*feeling} in a {animal} than in a {thing}, as {b} found out.
        {*feeling} is a poor {thing}, said the {animal} to the {animal2}, but it lasts.
        """,
    "doc_riddle": """
        {a} asked {b} a riddle. "I am {*look}, I (live|sit|wait) <nook>, and (I help you|{*role.s} need me|you take \
me) \
to {use.v}. (what am I|who am I|what is my name)?" <guess> "you are a \
{use}!" <saying:b>. "to {use.v}(, | )(one|everybody|a {*role}) needs a {use}." {a} gave {b.him} a {*thing.x}.
        "what says {sound.v} and sleeps <nook>?" {a} asked the {b.role}. <guess> "a {sound}," <saying:b>. "every \
{sound} \
says {sound.v}, {a}."
        ---
        "{b}, guess: people take me to {use.v}, and {*trait} {*role.s} keep me <nook>," said {a} {*adv}. <guess> "then \
you must be a {use}," <saying:b>, {*mood}.
        what did {a} hear <nook>? it said {sound.v}. <guess> "that was a {sound}, {a}," <saying:b>.
        """,
    "guess": """
        {b} thought {*adv}. "is it a {*thing}?" "no, {b}."
        "a {*thing.x}?" {b} asked. {a} shook {a.his} head {*adv}.
        {b} {*move.ed} around the {*spot} {*n} times.
        ---
        {b} looked {*mood}. "could it be a {*thing}, {a}?" It could not.
        {n} times {b} guessed {*adv}, and {n} times {a} laughed.
        """,
    "doc_howto": """
        how to {work} a {thing}, by {a}, {a.role}: <do> <do> <do> <warn>
        {b} asked {a} how to {work} a {thing.x}. "it is easy, {b}," <saying:a>. <do> <do> <warn>
        ---
        {a} once showed {b} the {b.role} how to {work} a {thing.x}. <do> <do> <warn>
        to {work} a {thing} like {a} does, be {*trait} and take {n} hours. <do> <do> <do> <warn>
        """,
    "do": """
        put the {thing} <nook> and hold the {*part} {*adv}.
        take (a {thing2.x}|the {thing2}) in (one|your left) hand and the {thing} in (the other|your right|the other \
one).
        clean the {*part} with {*staple} and the {thing2}, until it is {*look}.
        look at the {thing} from the {*part}; if it is {*look}, {*work} it again.
        ask your {a.kin} for a {thing2} if the {thing} is too {*look}.
        ---
        with the {thing2.x}, go over the {*part} of the {thing} {*adv}.
        let the {thing} lie <nook> while you {*work} the {thing2}.
        turn the {thing} so that its {*part} looks {*look}.
        """,
    "warn": """
        never {work} a {thing} in {*weather}, (says|thinks) {a}, or it will (smell|taste) of {*vegetable.s}.
        when you {work} the {thing}, keep the {*animal} away from the {thing2}.
        that is (all|how {a} does it|the whole secret), and (now|then) (you|even a {*role}) can {work} (any|every|the \
oldest) {thing} in {town}.
        ---
        who cannot {work} a {thing} in {n} hours should let {a} do it.
        mind the {thing2}, {a} {*say.es}, and you will {work} every {thing} in {town}.
        """,
    # --- free sentences: the widest part of the grammar, so that a model sees more than a few frames -----------------
    "np": """
        the {*thing}
        a {*thing.x}
        the {*thing.x}
        the {thing}
        (every|each|another|no|some) {*thing}
        {*n} {*thing.s}
        the {*part} of the {thing}
        {a.his} {*look} {*thing}
        the {*role}'s {*thing}
        (both|all) the {*thing.s}
        a {*thing} and a {*thing}
        (a bowl of|some|enough|a little|too much) {*staple}
        {a}'s {*thing}
        (this|that) {*thing}
        a (letter|song|book) about {*feeling}
        either the {*thing} or the {*thing}
        ---
        one more {*thing}
        that {*look} {*thing} of {b}
        {a}'s own {*thing}
        such a {*thing.x}
        the {*thing} with the {*look} {*part}
        """,
    "who": """
        {a}
        {a}
        {b}
        {a.he}
        {b.he}
        the {*role}
        a {*trait} {*role}
        (everybody|everyone|nobody|somebody|no one) in {town}
        {a.his} {a.kin}
        {b.his} {*trait} {b.kin}
        the {*animal.x}
        one of the {*role.s}
        {a} (and|or) {b}
        (most|few|some|all|none) of the {*role.s}
        the {*role} (of|from) {town}
        a (man|woman|boy|girl|stranger|child) from {town}
        ---
        the {*trait} {b}
        every {*role} at the {*place}
        {a}, not {b},
        {b}'s own {b.kin}
        an old friend of {a}
        """,
    "pp": """
        (to|at|from|into|through|across|around|towards) the {*place}
        (over|under|along|past|beyond|without) the {*placeadj} {*place}
        (on|under|behind|against|beside|below|beneath|above) the {*spot}
        (in|inside|into|out of) a {*thing.x}
        with (the|a) {*thing}
        without <np>
        (because of|after|before|during|in spite of) the {*weather}
        for {*n} (hours|days|weeks|years|minutes)
        (until|since|before|after|on) {*weekday}
        as {*adv} as (possible|before|ever|{b})
        (away|back|home|out|up|down|off|together|alone|again|once more)
        (with|without|instead of|next to|like) {b}
        in the {*season}
        (from|to|towards|near) {town}
        as {*mood} as a {*animal}
        ---
        all the way from the {*place}
        through {*weather} and {*weather}
        with <np> and no {*thing}
        by the {*spot} of {b}
        no later than {*weekday}
        """,
    "vp": """
        {*work.ed} <np>
        {*work.ed} <np> <pp>
        {*move.ed} <pp>
        {*move.ed} {*adv} <pp>
        was (never|always|still|not|already|often|almost|quite|rather|too|more than) {*mood}
        (took|brought|threw|put|left|lost|found|saw|stole|sold|bought|kept|needed) <np> <pp>
        (gave|sold|showed|lent|promised|offered|passed) <np> to {b}
        (wanted|tried|hoped|began|forgot|promised|had|used) to {*work} <np>
        (could|would|should|might|did|must) (not|never|also|only|even|still) {*work} <np>
        (could|would|might|should|must) {*move} <pp>
        had (never|once|already|just|often) {*work.ed} <np>
        (stood|sat|lay|waited|slept|stayed|fell|leaned|lived|sang|cried|laughed) <pp>
        (told|asked|begged|taught|helped|let) {b} (about <np>|for <np>|with <np>)
        (thought|knew|said|believed|heard|dreamt|feared|saw) that <who> {*work.ed} <np>
        (thought|spoke|dreamt|heard|read|knew|sang) of <np>
        (looked|pointed|laughed|smiled|shouted|knocked) at <np> [{*adv} ]<pp>
        (felt|seemed|looked|became|grew|was) {*mood} <pp>
        asked (where|why|when|how) <who> {*work.ed} <np>
        kept {*work.ing} <np>
        (stopped|went on|began|loved|hated) {*move.ing} <pp>
        got <np> for {*n} coins
        was (called|known as|said to be|thought to be) {*trait}
        made <np> out of <np>
        ---
        had to {*work} <np> again
        came to {*work} <np> <pp>
        took {*n} hours to {*move} <pp>
        saw <who> {*work} <np>
        turned to <np> and felt {*mood}
        """,
    "link": """
        (although|though|because|since|while|when|whenever|before|after|until|if|unless|as)
        (even though|even if|just as|as soon as|as long as|so that|now that|every time)
        (the day|the moment|the year|by the time)
        ---
        (once|ever since|each time|only because|long after)
        """,
    "free": """
        <who> <vp>.
        <who> <vp>.
        <who> <vp>, (and|but|so|for|yet|or) <who> <vp>.
        <link> <who> <vp>, <who> <vp>.
        <who> <vp> <link> <who> <vp>.
        <who> <vp> and <vp>.
        <who> <vp>, <vp>, and <vp>.
        (then|soon|later|at last|suddenly|perhaps|maybe|once|still|now|instead|in the end), <who> <vp>.
        <pp>, <who> <vp>.
        "<who> <vp>," <saying:a>.
        "(why|how|when) did <who> {*work} <np>?" {b} asked {a}.
        "(please|now|then|come), {*work} <np>[ for me], {b}!" cried {a}.
        "(I|you|we|they) (must|cannot|will|should|would|could|may|shall) {*work} <np>, {b}," <saying:a>.
        "(I am|you are|he is|she is|it is|we are|they are) (very|so|too|not|never|only) {*mood}," <saying:b>.
        "(let me|let us|help me|help him) {*work} <np>," <saying:b>.
        "(do|did|can|will|would) (you|they|we) {*work} <np> <pp>?" asked {b} {*adv}.
        "(yes|no|perhaps|never|of course|thank you), {a}," <saying:b>. "<who> <vp>."
        (there|here) (was|stood|lay|hung|came) <np> <pp>.
        (there was|there had been) (nothing|something|not much|somebody|much) to {*work} <pp>.
        it was (not |)(<who>|<np>) that {a} {*work.ed} <pp>.
        (what|all that|the only thing that) {a} {*work.ed} was <np>.
        the {thing} was (more {*look} than|as {*look} as|less {*look} than|not so {*look} as) <np>.
        (neither {a} nor|both {a} and|not {a} but) {b} {*work.ed} <np>.
        (nothing|nobody|few things|not even {b}) (was|seemed|felt) so {*look} to {a} as <np>.
        who {*work.ed} <np>? (it was|not|perhaps|only) <who>.
        how {*mood} {a} was, and how {*mood} <who> was!
        <who>, who <vp>, <vp>.
        the {*role} who {*work.ed} <np> <vp>.
        if only {a} had {*work.ed} <np>!
        the (more|less) {a} {*work.ed} <np>, the (more|less) {*mood} {b} was.
        (first|second|last) came <who>, then <who>.
        ---
        not until {*weekday} did {a} {*work} <np>.
        <who> <vp>; <who> <vp>.
        <link> {a} <vp>, {b} <vp> and <vp>.
        "but <who> <vp>, {a}," <saying:b>.
        <np> was what <who> wanted, and <who> <vp>.
        is it true that <who> <vp>? {a} says so.
        """,
    "doc_free": """
        {a} and {b} lived in {town}. <free> <free> <free> <free>[ <free>]
        <when>, {a} had a {thing.x}. <free> <free> <free> <free> <free>
        <free> <free> <free>[ <free>] <free>
        {a} the {a.role} met {b}, who was {*trait}. <free> <free> <free> <free>
        <free>~<free>~<free> <free>
        <scenery> <free> <free> <gesture:a> <free>
        ---
        {b} was the {b.role} of {town}, and {a} was {b.his} friend. <free> <scenery> <free>
        <gesture:b> <free> <scenery> <free>
        in {town} it was {*weekday}. <free> <gesture:a> <gesture:b>
        """,
    # --- instructions: "instruction ## response" or "instruction ## input ## response" --------------------------------
    "task": """
        write a story about a {animal} and a {thing}. ## a {animal.x} called {a} lived <where>. <when>, {a} found a \
{thing.x} <nook>. <tale> <tale> the {animal} kept the {thing} and was {*mood}.
        tell a short story in which {a} the {a.role} loses a {thing}. ## <owner> <loss> <search> <helper> <found>
        name the colour of {colorof}. ## {colorof} is {colorof.v}.
        what colour is {colorof}? ## the colour of {colorof} is {colorof.v}.
        what is the opposite of {opposite}? ## the opposite of {opposite} is {opposite.v}.
        what sound does a {sound} make? ## a {sound} says {sound.v}.
        what do you need to {use.v}? ## to {use.v}, you need a {use}.
        what is a {use} for? ## a {use} is there to {use.v}.
        who makes {maker}? ## the {maker.v} makes {maker}.
        where does a {home} live? ## (the home of a|a {*look} place for a|the right place for a) {home} is the {home.v}.
        what is a young {young} called? ## (a young {young}|it|such a {young}|the young of a {young}) is (called |)a \
{young.v}.
        list three kinds of fruit. ## {*fruit.s}, {*fruit.s} and {*fruit.s}.
        list three vegetables for a {dish}. ## for a {dish} take {*vegetable.s}, {*vegetable.s} and {*vegetable.s}.
        name three animals. ## {*animal}, {*animal} and {*animal}.
        list three things that {a} could put in a {thing}. ## {a} could put a {*thing}, a {*fruit} and a {*thing.x} in \
the {thing}.
        give {a} a greeting. ## good {daypart}, {a}! I hope you are {*mood}.
        write a thank-you note to {a} for the {thing}. ## dear {a}, thank you for the {thing}. it is {*look}, and I \
{*work} it every {*daypart}. it stands <nook>.
        describe the {place} of {town}. ## the {place} of {town} is {*placeadj}. <scenery> <inside>
        where is the {thing}? ## {a} put the {thing.x} {nook2}. then {a.he} {*move.ed} to the {*place}. ## the {thing} \
is \
{nook2}.
        who has the {thing}? ## {a} gave the {thing.x} to {b}, and {b} {*move.ed} to {town}. ## {b} has the {thing}.
        how does {a} feel? ## <when>, {a} the {a.role} was {mood}, and {b} was {mood2}. ## {a} is {mood}.
        what does {a} want? ## {a} and {b} sat <where>. {a} wanted to {goal}, and {b} wanted to sleep. ## {a} wants to \
{goal}.
        name the people in the text. ## {a} met {b} and {c} <where> <when>. ## {a}, {b} and {c}.
        what does {a} do for a living? ## {a} the {a.role} and {b} the {b.role} {*move.ed} to {town}. ## {a} is a \
{a.role}.
        give a reason why {a} is {mood}. ## {a} is {mood} because <trouble>.
        ---
        tell me about a {animal} and a {thing}, with {a} in it. ## {a} had a {animal.x} and a {thing.x}. <tale> <tale> \
so \
{a}, the {animal} and the {thing} stayed together.
        {a} wants to know the colour of {colorof}. ## tell {a} that {colorof} is {colorof.v}.
        {a} says {opposite}. say the opposite. ## the opposite of {opposite} is {opposite.v}, {a}.
        {a} the {a.role} has to {use.v}. what does {a.he} need? ## {a} needs a {use} to {use.v}.
        name three fruits for {a} to buy in {town}. ## {a} can buy {*fruit.s}, {*fruit.s} and {*fruit.s} in {town}.
        say good {daypart} to {a}. ## good {daypart}, dear {a}! how is your {*thing}?
        find out where the {thing} of {a} is. ## {a}, the {*trait} {a.role}, left the {thing.x} {nook2} <when>. ## the \
{thing} of {a} is {nook2}.
        who is {*move.ing} to {town}? ## while {a} {*work.ed} a {*thing.x}, {b} was on the road to {town}. ## it is {b}.
        what is {a} hoping for? ## {b} is {mood}, but {a} hopes to {goal}. ## {a} hopes to {goal}.
        why is {b} {mood}? ## {b} is {mood} because {a} took the {thing} and because <trouble>.
        """,
    "tale": """
        then a {*trait} {*role} wanted to {*work} the {thing}, but the {animal} {*move.ed} off {*adv}.
        {a} ran away with the {thing}, and a {*role} {*move.ed} after {a.him}.
        that {*daypart} {a} slept on the {thing}, {*mood} and {*mood}.
        "what a {*look} {thing}," <saying:a>.
        the {thing} made a {*noise}, and {a} was {*mood}.
        {a} hid the {thing} <nook> and {*move.ed} to the {*place.x}.
        ---
        one {*daypart} the {animal} ran away with the {thing}, and {a} {*move.ed} after it.
        {a} found the {thing} <nook>, and the {animal} slept on it.
        "that {animal} is {*mood}," <saying:a>, "and the {thing} is {*look}."
        """,
}

# How often each genre is drawn.  Instruction documents are frequent because they are short.
_GENRES = {
    "doc_lost": 4, "doc_free": 9, "doc_repair": 3, "doc_plan": 4, "doc_contest": 2, "doc_talk": 4, "doc_play": 2, \
"doc_letter": 3,
    "doc_diary": 2, "doc_notice": 3, "doc_facts": 4, "doc_recipe": 2, "doc_weather": 2, "doc_market": 3, "doc_room": 2,
    "doc_fable": 3, "doc_riddle": 2, "doc_howto": 2, "task": 8,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Reading the tables.


def _entries(group: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for word in group.split())


@cache
def lexicon(sort: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The (shared, train-only, heldout-only) entries of a sort of words."""
    shared, train, heldout = (_entries(group) for group in _LEXICON[sort].split("|"))
    return shared, train + _entries(_TAILS.get(sort, "")), heldout


@cache
def alternatives(rule: str, split: str) -> tuple[str, ...]:
    """The alternatives of a grammar rule that documents of this split may use."""
    train, heldout = _RULES[rule].split("---\n")
    lines = (line.strip() for line in (train if split == "train" else heldout).splitlines())
    return tuple(line for line in lines if line)


def sorts() -> tuple[str, ...]:
    return tuple(_LEXICON)


def rules() -> tuple[str, ...]:
    return tuple(_RULES)


def name_split(name: str) -> str:
    """Which split owns a synthesized name: a fixed hash of the name, so the two sets of names are disjoint."""
    for sort in ("fname", "mname"):
        # Syllables may happen to spell a listed name ("Greta"), which then belongs where the list has it.
        for group, owner in zip(lexicon(sort), ("shared", *SPLITS), strict=True):
            if name in group:
                return owner
    return "heldout" if zlib.crc32(name.encode()) % 4 == 0 else "train"


# ---------------------------------------------------------------------------------------------------------------------
# Inflection.

_PAST = {
    "say": "said", "run": "ran", "ride": "rode", "drive": "drove", "creep": "crept", "hide": "hid", "hold": "held",
    "bring": "brought", "keep": "kept", "shake": "shook", "swing": "swung", "bend": "bent", "flee": "fled",
    "tread": "trod", "swear": "swore", "tear": "tore", "wind": "wound", "hang": "hung", "split": "split",
    "stride": "strode", "slide": "slid", "speed": "sped",
}  # fmt: skip
_SAME_PLURAL = "sheep deer salmon trout cod shrimp mackerel pike tuna bison squid".split()
_PLURAL = {
    "mouse": "mice", "goose": "geese", "wolf": "wolves", "knife": "knives", "scarf": "scarves", "potato": "potatoes",
    "tomato": "tomatoes", "mango": "mangoes", "mosquito": "mosquitoes", "buffalo": "buffaloes", "calf": "calves",
    "ox": "oxen", **{noun: noun for noun in _SAME_PLURAL},
}  # fmt: skip
_ORDINAL = {
    "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth",
    "twenty": "twentieth",
}  # fmt: skip
_DOUBLED = set(
    "run wrap drop scrub travel hop jog skip step tap trim trot beg brag snap sob split knit swap rub nod strip "
    "pedal label zigzag".split()
)


def _first_word(inflect):
    """Lift an inflection of one word to a phrase that starts with it."""
    return lambda phrase: " ".join([inflect(phrase.split()[0]), *phrase.split()[1:]])


@_first_word
def past(verb: str) -> str:
    if verb in _PAST:
        return _PAST[verb]
    if verb in _DOUBLED:
        return verb + verb[-1] + "ed"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


@_first_word
def gerund(verb: str) -> str:
    if verb in _DOUBLED:
        return verb + verb[-1] + "ing"
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    return (verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb) + "ing"


def plural(noun: str) -> str:
    if noun in _PLURAL:
        return _PLURAL[noun]
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "z")) else "s")


third = _first_word(plural)  # "he carries" is spelled like "berries"


def ordinal(number: str) -> str:
    return _ORDINAL.get(number, number + "th")


_INFLECT = {"s": plural, "ed": past, "ing": gerund, "es": third, "th": ordinal}

# ---------------------------------------------------------------------------------------------------------------------
# Expansion.

_OPTION = re.compile(r"([\[(])([^\[\]()]*)[\])]")
_SLOT = re.compile(r"<([a-z_]+\d?)(?::(\w+))?>|\{(\*?)([a-z_]+?\d?)(?:\.(\w+))?\}")
_PERSONS = ("a", "b", "c")


@dataclass(frozen=True)
class Person:
    name: str
    gender: str  # "she" or "he"
    role: str
    kin: str

    def form(self, modifier: str | None) -> str:
        if modifier is None:
            return self.name
        if modifier in ("role", "kin"):
            return getattr(self, modifier)
        word = _PRONOUNS[self.gender][modifier.lower()]
        return word.capitalize() if modifier[0].isupper() else word


class Scene:
    """One document in the making: the random state, and what has been said about whom so far."""

    def __init__(self, rng: random.Random, split: str):
        self.rng = rng
        self.split = split
        self.bound: dict[str, object] = {}
        self.used: dict[str, set[str]] = {}  # the alternatives taken so far, by rule
        self.held: set[str] = set()  # the held-out words drawn so far
        self.unseen = 0  # how many of them the text really shows (a role may be drawn and not mentioned)

    def word(self, sort: str) -> str:
        """A word of this sort that is not bound yet (two kettles in one story would confuse everybody)."""
        if sort == "town":
            return self._town()
        shared, train, heldout = lexicon(sort)
        taken = [value for key, value in self.bound.items() if key.rstrip("0123456789") == sort]
        for _ in range(20):
            if self.split == "train":
                # The shared words stay the common ones, however long the tail of the training words is.
                word = self.rng.choice(train if train and self.rng.random() < 0.35 else shared)
            elif heldout and self.rng.random() < 0.3:
                word = self.rng.choice(heldout)
            else:
                word = self.rng.choice(shared)
            if word not in taken:
                break
        if word in heldout:
            self.held.add(word)
        return word

    def _synthesize(self, make) -> str:
        while True:
            name = make()
            if name_split(name) == self.split:
                if self.split == "heldout":
                    self.held.add(name)
                return name

    def _town(self) -> str:
        # Both halves are ordinary words of the split; the hash keeps the whole name out of the other split.
        return self._synthesize(lambda: (self.word("town1") + self.word("town2")).capitalize())

    def _name(self, gender: str) -> str:
        rng = self.rng
        if rng.random() < 0.35:
            return self.word("fname" if gender == "she" else "mname")

        def make() -> str:
            middle = [rng.choice(_NAME_VOWEL) + rng.choice(_NAME_MIDDLE) for _ in range(rng.choice((1, 1, 1, 2)))]
            return (rng.choice(_NAME_START) + "".join(middle) + rng.choice(_NAME_END[gender])).capitalize()

        return self._synthesize(make)

    def person(self) -> Person:
        gender = self.rng.choice(("she", "he"))
        names = [value.name for value in self.bound.values() if isinstance(value, Person)]
        name = self._name(gender)
        while name in names:
            name = self._name(gender)
        return Person(name, gender, self.word("role"), self.rng.choice(_KIN[gender].split()))

    def adjectives(self, sort: str) -> str:
        kinds = _ADJECTIVES[sort]
        count = 1 if len(kinds) == 1 or self.rng.random() < 0.6 else 2
        chosen = sorted(self.rng.sample(range(len(kinds)), count))
        return " ".join(self.word(kinds[i]) for i in chosen)

    def _value(self, key: str, fresh: bool):
        if not fresh and key in self.bound:
            return self.bound[key]
        sort = key.rstrip("0123456789")
        value = self.person() if sort in _PERSONS else self.expand(sort) if sort in _RULES else self.word(sort)
        if not fresh:
            self.bound[key] = value
        return value

    def _slot(self, match: re.Match) -> str:
        rule, argument, star, key, modifier = match.groups()
        if rule:
            return self.expand(rule, argument)
        value = self._value(key, bool(star))
        if isinstance(value, Person):
            return self._shown(value.form(modifier))
        if modifier == "x":
            sort = key.rstrip("0123456789")
            adjectives = self.adjectives(sort) if star else self.bound.setdefault(key + " x", self.adjectives(sort))
            return self._shown(f"{adjectives} {value}")
        head, _, fact = value.partition("=")
        if modifier == "v":
            return fact
        self._shown(head)
        return _INFLECT[modifier](head) if modifier else head

    def _shown(self, text: str) -> str:
        self.unseen += not self.held.isdisjoint(text.split())
        return text

    def _alternative(self, rule: str) -> str:
        """An alternative that this document has not used yet, as long as there is one."""
        options = alternatives(rule, self.split)
        used = self.used.setdefault(rule, set())
        unused = [option for option in options if option not in used]
        if not unused:
            used.clear()
        choice = self.rng.choice(unused or options)
        used.add(choice)
        return choice

    def expand(self, rule: str, argument: str | None = None) -> str:
        text = self._alternative(rule)
        if argument:
            text = text.replace("@", argument)
        while match := _OPTION.search(text):
            kept = self._keep(*match.groups())
            text = text[: match.start()] + kept + text[match.end() :]
        return _SLOT.sub(self._slot, text)

    def _keep(self, bracket: str, inner: str) -> str:
        if bracket == "(" and "|" not in inner:  # a stage direction, not a choice
            return f"\x00{inner}\x01"
        return self.rng.choice(inner.split("|")) if bracket == "(" else inner if self.rng.random() < 0.5 else ""


_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou]|honest)(?!one\b|use|uni)")
# After '!"' and '?"' a new sentence needs its own quotation mark: '"My hat!" cried Tom.' goes on in lower case.
_SENTENCE = re.compile(r'(^"?|\."? "?|[!?] "?|[!?]" "|\n"?|[ (]"|(?:\n\w+|Question|Answer): )([a-z])')


def tidy(text: str) -> str:
    """Line breaks, a/an, and capital letters at the start of sentences."""
    text = text.replace("~", "\n").replace("\x00", "(").replace("\x01", ")")
    text = _ARTICLE.sub(r"\1n ", text)
    return _SENTENCE.sub(lambda match: match[1] + match[2].upper(), text)


# ---------------------------------------------------------------------------------------------------------------------
# Documents.

PREAMBLE = {
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
}


def prompt(instruction: str, given: str = "", preamble: bool = True) -> str:
    """The Alpaca prompt, up to and with "### Response:" and its line break."""
    parts = [PREAMBLE[bool(given)]] if preamble else []
    parts.append(f"### Instruction:\n{instruction}")
    if given:
        parts.append(f"### Input:\n{given}")
    return "\n\n".join([*parts, "### Response:\n"])


def document(rng: random.Random, split: str) -> tuple[str, Scene]:
    """One document, and the scene it came from."""
    scene = Scene(rng, split)
    genre = rng.choices(list(_GENRES), weights=list(_GENRES.values()))[0]
    body = scene.expand(genre)
    if genre != "task":
        return tidy(body), scene
    *question, response = (tidy(part.strip()) for part in body.split("##"))
    return prompt(*question, preamble=rng.random() < 0.3) + response, scene


def documents(seed: int, split: str) -> Iterator[str]:
    """An endless stream of documents; the same seed and split give the same stream."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = random.Random(f"{split}:{seed}")
    while True:
        text, scene = document(rng, split)
        # Every held-out document shows at least one word that training never shows.
        if split == "train" or scene.unseen:
            yield text


def text(seed: int, split: str, n_chars: int) -> str:
    """At least ``n_chars`` characters of whole documents, blank lines between them."""
    parts, length = [], 0
    for part in documents(seed, split):
        parts.append(part)
        length += len(part) + 2
        if length >= n_chars:
            return "\n\n".join(parts) + "\n"
    raise AssertionError("unreachable: the stream of documents has no end")


# ---------------------------------------------------------------------------------------------------------------------
# Instruction records: the data of the instruction examples (examples/assets/instructions.jsonl).

_SPARE = {  # hand-written answers, "question = answer"
    "plain": """
        How do I keep bread fresh? = Wrap the bread in a clean cloth and keep it in a dry box.
        How do I stay warm in winter? = Wear a thick coat, move around, and drink something hot.
        How can I fall asleep? = Put out the lamp, lie still, and breathe slowly. Sleep will come.
        What should I do when it rains? = Take an umbrella, or stay inside and read a book.
        How do I make a friend? = Be kind, ask a question, and listen to the answer.
        What should I say when I am late? = Say that you are sorry, and try to be early next time.
        How do I clean a muddy boot? = Let the mud dry, brush it off, and wipe the boot with a wet cloth.
        How do I plant a tree? = Dig a deep hole, set the roots in it, fill it with earth, and water it well.
        How do I boil an egg? = Put the egg in boiling water, wait six minutes, and cool it under cold water.
        How can I learn a song? = Sing one line at a time, and begin again until you know them all.
        What should I take on a journey? = Take a map, some bread, a bottle of water, and a warm coat.
        How do I find a lost key? = Think of the last place where you held the key, and begin to look there.
        How do I calm a frightened horse? = Stand still, speak softly, and hold out your open hand.
        Why do we need sleep? = Sleep gives rest to the body and makes the mind clear again.
        Why does bread rise? = The yeast in the dough makes small bubbles, and they lift the bread.
        Why do birds fly south? = They fly south because the winter is cold and there is little food.
        Why do leaves fall? = In autumn the tree saves its strength, so it lets its leaves fall.
        Why do we wash our hands? = We wash our hands to take away dirt that could make us ill.
        Why is the road wet in the morning? = It rained at night, or the mist left small drops on the stones.
        How do I thank a neighbour? = Say thank you, and bring a small cake or a bunch of flowers.
        How do I carry a heavy box? = Bend your knees, hold the box close to you, and stand up slowly.
        How do I write a letter? = Begin with a greeting, tell your news, ask a question, and sign your name.
        How can I be brave? = Take one small step, even when you are afraid. Then take another one.
        What makes a good story? = A good story has somebody who wants something, and something in the way.
        How do I feed a hen? = Give the hen grain twice a day, and fresh water every morning.
        How do I light a fire? = Set small dry sticks under big ones, and hold a match to the small ones.
        How do I catch a fish? = Put bait on a hook, drop it in the water, and wait without a noise.
        How do I share a cake fairly? = One person cuts the cake, and the other one chooses the first piece.
        What should I do when I am bored? = Go for a walk, draw a picture, or help somebody with their work.
        How do I learn to swim? = Start in shallow water, learn to float, and let a friend stay near you.
        What is a good breakfast? = A good breakfast is warm porridge with an apple and a little honey.
        How do I grow carrots? = Sow the seeds in soft earth, keep them wet, and pull them up in autumn.
        Why does ice float? = Ice is lighter than water, so it stays on top of it.
        What is a map good for? = A map shows where things are, so you can find your way.
        When should I pick apples? = Pick apples in autumn, when they come off the branch with a light turn.
        Who should I ask for help? = Ask somebody you trust, such as a friend, a teacher, or your mother.
        """,
    "list": """
        three things you find in a kitchen = A kettle, a stove, and a bowl.
        three things you find at a market = Fruit, bread, and a crowd of people.
        three animals that live on a farm = A cow, a hen, and a pig.
        three animals that live in the forest = A fox, a deer, and an owl.
        three animals that can swim = A duck, a frog, and a fish.
        three things that are round = A coin, a wheel, and an apple.
        three things that are cold = Snow, ice, and the sea in winter.
        three things that are hot = Fire, boiling soup, and the sun.
        three sweet foods = Honey, cake, and a ripe pear.
        three things made of wood = A table, a ladder, and a fiddle.
        three things made of glass = A bottle, a window, and a jar.
        three things made of iron = A key, an anvil, and a chain.
        three things that fly = A bird, a bee, and a kite.
        three tools = A hammer, a saw, and a rake.
        three kinds of weather = Rain, snow, and sunshine.
        three feelings = Joy, fear, and hope.
        three games = Chess, cards, and tag.
        three things to wear in winter = A coat, a scarf, and warm gloves.
        three things to drink = Water, milk, and tea.
        three kinds of trees = An oak, a birch, and a willow.
        three flowers = A rose, a lily, and a daisy.
        three things you can read = A book, a letter, and a map.
        three things with wheels = A cart, a wagon, and a train.
        three people who work with their hands = A potter, a weaver, and a carpenter.
        """,
    "polite": """
        Give me the salt. = Could you please give me the salt?
        Close the door. = Would you please close the door?
        Be quiet. = Could you please be a little quieter?
        Come here. = Would you come here for a moment, please?
        Move your cart. = Could you please move your cart?
        Wait for me. = Would you wait for me, please?
        Tell me your name. = May I ask for your name, please?
        Help me with this box. = Could you help me with this box, please?
        Stop that noise. = Would you please stop that noise?
        Bring some water. = Could you bring some water, please?
        Open the window. = Would you please open the window?
        Lend me your pencil. = May I borrow your pencil, please?
        """,
    "past": """
        The baker opens the shop. = The baker opened the shop.
        Anna walks to the lake. = Anna walked to the lake.
        The dog barks at the moon. = The dog barked at the moon.
        Tom carries the heavy basket. = Tom carried the heavy basket.
        The children play in the meadow. = The children played in the meadow.
        It rains all day long. = It rained all day long.
        Clara keeps the small key. = Clara kept the small key.
        The horse runs to the stable. = The horse ran to the stable.
        Hugo paints the garden gate. = Hugo painted the garden gate.
        The old boat is empty. = The old boat was empty.
        Ruth brings the warm bread. = Ruth brought the warm bread.
        The owl sleeps in the barn. = The owl slept in the barn.
        """,
}


def _spare(kind: str) -> list[list[str]]:
    return [line.strip().split(" = ") for line in _SPARE[kind].strip().splitlines()]


def _given_facts(rng: random.Random, count: int) -> Iterator[tuple[str, str, str]]:
    """Questions about a sentence or two, with the answer in them."""
    people = [(name, "her") for name in lexicon("fname")[0]] + [(name, "his") for name in lexicon("mname")[0]]
    for i in range(count):
        (name, his), (friend, _) = rng.sample(people, 2)
        thing, other = rng.sample(lexicon("thing")[0], 2)
        colour, place, spot, role = (rng.choice(lexicon(sort)[0]) for sort in ("colour", "place", "spot", "role"))
        number, animal, day = (rng.choice(lexicon(sort)[0]) for sort in ("n", "animal", "weekday"))
        yield (
            (
                f"Where is the {thing}?",
                f"{name} put the {thing} under the {spot} and took the {other} to the {place}.",
                f"The {thing} is under the {spot}, where {name} put it.",
            ),
            (
                f"What colour is the {thing}?",
                f"{name} the {role} has a {colour} {thing}. {friend} has none.",
                f"The {thing} is {colour}, and it belongs to {name}.",
            ),
            (
                "Who has it now?",
                f"{name} gave {his} {thing} to {friend} on {day}.",
                f"{friend} has the {thing} now, since {name} gave it away.",
            ),
            (
                f"How many {plural(animal)} are there?",
                f"At the {place}, {name} saw {number} {plural(animal)} and one {other}.",
                f"There are {number} {plural(animal)} at the {place}.",
            ),
            (
                "Say it in one short sentence.",
                f"On {day} it was raining, and so {name}, who is a {role}, stayed at home and cleaned the {thing}.",
                f"{name} stayed at home on {day} and cleaned the {thing}.",
            ),
            (
                f"What is the work of {name}?",
                f"{name} the {role} and {friend} met at the {place} on {day}.",
                f"{name} works as a {role} and met {friend} at the {place}.",
            ),
        )[i % 6]


def instruction_records(seed: int = 0) -> list[dict]:
    """The instruction records: hand-written answers, facts of the tables, and questions about a given text."""
    rng = random.Random(f"instructions:{seed}")

    def facts(sort: str) -> list[list[str]]:
        return [entry.split("=") for entry in lexicon(sort)[0]]

    rows = [(question, "", answer) for question, answer in _spare("plain")]
    rows += [(f"List {what}.", "", f"{answer[:-1]} are {what}.") for what, answer in _spare("list")]
    rows += [("Make this request polite.", request, answer) for request, answer in _spare("polite")]
    rows += [("Put this sentence into the past.", sentence, answer) for sentence, answer in _spare("past")]
    rows += [
        (f"Which colour does {x} have?", "", f"The colour of {x} is {v}, as everybody can see.")
        for x, v in facts("colorof")
    ]
    for x, v in facts("opposite"):
        rows.append((f"Give me the opposite of {x}.", "", f"The opposite of {x} is {v}."))
        rows.append((f"Is {x} the same as {v}?", "", f"No, {x} is the opposite of {v}."))
    rows += [(f"How does a {x} sound?", "", f"A {x} says {v}, and it can say it loudly.") for x, v in facts("sound")]
    for x, v in facts("use"):
        rows.append((f"Why would I want a {x}?", "", f"With a {x} you can {v}, so it is good to have one."))
        rows.append((f"I have to {v}. What should I take?", "", f"Take a {x}. It will help you to {v}."))
    rows += [(f"Where do we get {x} from?", "", f"We get {x} from the {v}, who works hard.") for x, v in facts("maker")]
    rows += [
        (f"Where can I find a {x}?", "", f"Look for the {x} in its {v}. That is its home.") for x, v in facts("home")
    ]
    rows += [
        (f"What do we call the young one of a {x}?", "", f"The young one of a {x} is called a {v}.")
        for x, v in facts("young")
    ]
    rows += list(_given_facts(rng, 90))
    rng.shuffle(rows)
    keys = ("instruction", "input", "output")
    return [dict(zip(keys, (_ARTICLE.sub(r"\1n ", part) for part in row), strict=True)) for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--chars", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--instructions", action="store_true", help="print the instruction records (JSON lines)")
    args = parser.parse_args(argv)
    if args.instructions:
        for record in instruction_records(args.seed):
            print(json.dumps(record))
        return 0
    sys.stdout.write(text(args.seed, args.split, args.chars))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
