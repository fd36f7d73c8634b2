"""What a voice is asked to say when it is measured."""

from __future__ import annotations

SENTENCES = tuple(
    line.strip()
    for line in """
    The birch canoe slid down the river.
    Please bring the paper before lunch.
    She closed the window because of the rain.
    My brother works in a small bakery.
    Seven people waited for the last bus.
    The doctor asked a very simple question.
    We walked home along the quiet street.
    Can you tell me where the station is?
    He painted the kitchen wall yellow.
    The children played behind the old church.
    A cold wind blew across the harbour.
    They sold their house in the spring.
    The soup was too hot to eat.
    I forgot my umbrella at the office.
    The teacher wrote three words on the board.
    Our neighbours keep bees in their garden.
    The train leaves at half past nine.
    Nobody knew the answer to the riddle.
    The baby slept through the whole storm.
    Put the books back on the shelf.
    The farmer sold apples at the market.
    It takes an hour to reach the village.
    The captain studied the map with care.
    You should drink a glass of water.
    The music stopped in the middle of the song.
    Her uncle built this table by hand.
    The lake was frozen until the end of March.
    A good story needs a surprising ending.
    The shop opens early on Saturday morning.
    He found an old coin under the floor.
    The judge listened to both sides.
    We planted tomatoes and beans this year.
    The bridge was closed for repairs.
    I would like a cup of strong coffee.
    The dog chased the ball into the bushes.
    They danced until the sun came up.
    The letter arrived two weeks too late.
    Turn left after the second traffic light.
    The museum is free on the first Sunday.
    She learned to swim when she was five.
    The roof of the barn needs new paint.
    He answered the phone with a sleepy voice.
    The recipe calls for butter and flour.
    Bright stars filled the evening sky.
    My grandmother tells the best jokes.
    The engine made a strange noise.
    We had to wait for a long time.
    The cat jumped over the garden fence.
    Please speak a little more slowly.
    Thank you for your help and your patience.
    """.strip().splitlines()
)
TEXTS = (
    "Hello there!",
    "How are you today?",
    "I am not so sure about that.",
    "The weather is nice, don't you think so?",
    "Thank you very much for calling; how can I help?",
    "We will meet at the station at seven, or a little later.",
    "Please call Stella and ask her to bring these things from the store.",
    "The quick brown fox jumps over the lazy dog, and then it runs away home.",
    "If you want to know what happened yesterday, you will have to ask him yourself.",
    "There are many things in this old house that nobody has looked at for thirty years, I should say so.",
)
