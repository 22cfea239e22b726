-- pages: how many messages of a list are read at once.
-- The server does nothing else meanwhile, and a large message takes long. How large one is cannot be asked before it
-- is read. So the first page of a list has one message, and each later one at most twice as many as were read before
-- it, but so few that they stay under PAGE_BYTES if all are as large as the largest so far. A large message behind
-- small ones is met soon, and is in a page with few others.
local PAGE, PAGE_BYTES = 32, 256 * 2 ^ 10

-- What is known of one list; `nothing` of one that nothing was read of.
local function nothing()
  return {count = 0, largest = 1}
end
local function next_page(seen)
  return math.max(1, math.min(2 * seen.count, PAGE, math.floor(PAGE_BYTES / seen.largest)))
end
local function note_page(seen, messages)
  seen.count = seen.count + #messages
  for n = 1, #messages do
    seen.largest = math.max(seen.largest, #messages[n])
  end
end
