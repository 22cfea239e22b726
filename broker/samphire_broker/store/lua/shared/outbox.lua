-- outbox: webhooks that are to be delivered. Each is a task of its own on the queue of its endpoint, and is written by the
-- script that writes what it tells of. An entry is [delivery id, endpoint, message, task in whose order it goes, "" for
-- none]; its message says "samphire_watermark":0, and run 1.
--   webhook:marks                 endpoint -> watermark of its last delivery
--   webhook:waiting:<endpoint>    ids of deliveries that have not ended, by watermark
--   webhook:ended:<endpoint>      ids of those that have, by watermark
--   webhook:delivery:<id>         message, state, at, attempts (JSON array) of one that has ended
--   webhook:order:<endpoint>:<task>  messages of one task that go one after the other; the first is on its way
local WEBHOOK = NAMESPACE .. 'webhook:'
local WAITS_S = 90 * 86400 -- what is told of deliveries that have not ended goes this long after the last of them
local RUN_STEP = 2 ^ 40 -- between the sequence numbers of a task's runs
local function delivery_list(endpoint)
  return 'samphire.webhooks.' .. endpoint
end
-- The id and the message of an entry of a run that is not the first: it has an id of its own.
local function in_run(id, message, run)
  local own = id .. '-' .. run
  message = string.gsub(message, id, own) -- letters, digits and "_": a pattern for itself
  -- What is sent is JSON in the body of the message, which is JSON in JSON.
  local quote = '\\\\\\"'
  message = string.gsub(message, quote .. 'run' .. quote .. ':1', function()
    return quote .. 'run' .. quote .. ':' .. run
  end, 1)
  message = string.gsub(message, quote .. 'sequence' .. quote .. ':(%d+)', function(number)
    return quote .. 'sequence' .. quote .. string.format(':%.0f', tonumber(number) + (run - 1) * RUN_STEP)
  end, 1)
  return own, message
end
-- Queue a delivery; false where its queue, and the list beside it, are keys of other types or not to be written.
local function send(endpoint, message, wake_channel)
  local where = push('LPUSH', delivery_list(endpoint), message)
  if where then
    try('PUBLISH', wake_channel, where)
  end
  return where ~= nil
end
-- False where nobody can send it: then nothing waits for that.
local function put_out(entry, run, wake_channel)
  local id, endpoint, message, order = entry[1], entry[2], entry[3], entry[4]
  if run and run > 1 then
    id, message = in_run(id, message, run)
  end
  local waiting = WEBHOOK .. 'waiting:' .. endpoint
  if try('EXISTS', WEBHOOK .. 'delivery:' .. id) == 1 or type(try('ZSCORE', waiting, id)) == 'string' then
    return true -- it was put out before
  end
  local mark = try('HINCRBY', WEBHOOK .. 'marks', endpoint, 1)
  mark = type(mark) == 'number' and mark or 0
  try('ZADD', waiting, mark, id)
  try('EXPIRE', waiting, WAITS_S)
  message = string.gsub(message, '"samphire_watermark":0', string.format('"samphire_watermark":%.0f', mark), 1)
  if order ~= '' then
    local turns = WEBHOOK .. 'order:' .. endpoint .. ':' .. order
    local length = try('RPUSH', turns, message)
    try('EXPIRE', turns, WAITS_S)
    if type(length) == 'number' and length > 1 then
      return true -- it goes once those before it have ended
    end
  end
  local is_sent = send(endpoint, message, wake_channel)
  if not is_sent then
    try('ZREM', waiting, id)
    if order ~= '' then
      try('RPOP', WEBHOOK .. 'order:' .. endpoint .. ':' .. order)
    end
  end
  return is_sent
end
-- The next delivery of a task goes where this one's turn has ended; one that was redriven has had its turn.
local function end_turn(id, endpoint, order, wake_channel)
  local turns = WEBHOOK .. 'order:' .. endpoint .. ':' .. order
  local first = try('LINDEX', turns, 0)
  if type(first) == 'string' and string.find(first, '"' .. id .. '"', 1, true) then
    try('LPOP', turns)
    local message = try('LINDEX', turns, 0)
    if type(message) == 'string' then
      send(endpoint, message, wake_channel)
    end
  end
end
-- What is kept of a delivery that has ended: so many for each endpoint, and for so long.
local function close_delivery(closed, message, history, wake_channel)
  local id, endpoint, order, state, attempt, kept_max, kept_s = unpack(closed)
  local record, ended = WEBHOOK .. 'delivery:' .. id, WEBHOOK .. 'ended:' .. endpoint
  local mark = try('ZSCORE', WEBHOOK .. 'waiting:' .. endpoint, id)
  mark = type(mark) == 'string' and mark or try('ZSCORE', ended, id) -- one that was redriven
  try('HSET', record, 'message', message, 'state', state, 'at', call('TIME')[1],
    'attempts', '[' .. (history and history .. ',' or '') .. attempt .. ']')
  try('EXPIRE', record, kept_s)
  try('ZREM', WEBHOOK .. 'waiting:' .. endpoint, id)
  try('ZADD', ended, type(mark) == 'string' and mark or 0, id)
  try('EXPIRE', ended, WAITS_S)
  local count = try('ZCARD', ended)
  if type(count) == 'number' and count > tonumber(kept_max) then
    local oldest = try('ZPOPMIN', ended, math.min(count - kept_max, 100))
    for n = 1, #oldest, 2 do
      try('UNLINK', WEBHOOK .. 'delivery:' .. oldest[n])
    end
  end
  if order ~= '' then
    end_turn(id, endpoint, order, wake_channel)
  end
end
-- A delivery that somebody has sent again by hand: its record tells, and a failure that it mends is none any more.
local function note_replay(closed, dead_key, letter_prefix)
  local id, state, attempt = closed[1], closed[4], closed[5]
  local record = WEBHOOK .. 'delivery:' .. id
  local attempts = try('HGET', record, 'attempts')
  if type(attempts) ~= 'string' then
    return
  end
  local before = match(attempts, '^%[(.*)%]$') or ''
  try('HSET', record, 'attempts', '[' .. before .. (before ~= '' and ',' or '') .. attempt .. ']')
  if state == 'delivered' and try('HGET', record, 'state') == 'failed' then
    try('HSET', record, 'state', state)
    try('ZREM', dead_key, id)
    try('UNLINK', letter_prefix .. id)
  end
end
