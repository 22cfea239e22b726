-- ended: how tasks have ended, remembered longer than their results.
-- What is remembered is a letter for how a task has ended (c: cancelled, and what follows from that is not paid yet),
-- the number of the run if it is not the first, and of a failure 16 digits of the SHA-1 of each message that has
-- failed, the last first. It lies in two hashes, of which the older goes when the newer is old enough: each end is
-- remembered for one to two lifetimes.
local STATES = {S = 'SUCCESS', F = 'FAILURE', C = 'REVOKED', c = 'REVOKED', E = 'REVOKED'}
local LETTERS = {succeeded = 'S', failed = 'F', cancelled = 'C', expired = 'E'}

local function recall(newer, older, ids) -- by position; nil where nothing is remembered
  local found = {}
  for _, hash in ipairs({newer, older}) do
    local asked, places = {}, {}
    for n = 1, #ids do
      if not found[n] then
        asked[#asked + 1], places[#places + 1] = ids[n], n
      end
    end
    local values = #asked > 0 and try('HMGET', hash, unpack(asked)) or {}
    for n = 1, values.err and 0 or #asked do
      found[places[n]] = values[n] or nil
    end
  end
  return found
end

local function remember(newer, older, turn, lifetime_s, ends) -- ends: id, what is remembered, id, …
  if #ends == 0 then
    return
  end
  local is_new = try('EXISTS', turn) == 0
  if is_new then
    try('UNLINK', older)
    if try('EXISTS', newer) == 1 then
      try('RENAME', newer, older)
    end
    try('SET', turn, '1', 'EX', lifetime_s)
  end
  for first = 1, #ends, 1000 do -- unpack takes at most 7,999 values
    try('HSET', newer, unpack(ends, first, math.min(first + 999, #ends)))
  end
  if is_new then
    try('EXPIRE', newer, 2 * lifetime_s)
  end
end

local function forget(newer, older, id)
  try('HDEL', newer, id)
  try('HDEL', older, id)
end

local function run_in(remembered)
  return tonumber(remembered and match(remembered, '^%a(%d+)') or 1)
end

local function digest_of(message)
  return string.sub(redis.sha1hex(message), 1, 16)
end

local FAILED_MAX = 4
-- The digests of the messages of a task that have failed, with that of another one.
local function failed_in(remembered)
  return remembered and match(remembered, '^F%d* (%x.*)$') or ''
end
local function with_failed(digests, message)
  local found = digest_of(message)
  local kept = 1
  for digest in string.gmatch(digests, '%x+') do
    if kept < FAILED_MAX then
      found, kept = found .. ' ' .. digest, kept + 1
    end
  end
  return found
end

-- Whether a message is one that has failed already: the same bytes, for who sends a task again sends another message
-- (kombu gives each a delivery tag of its own). Where that is not remembered its letter tells; where there is none
-- either, the message is a new one.
local function is_among(digests, message)
  return string.find(digests, digest_of(message), 1, true) ~= nil
end
local function has_failed(message, remembered, letter)
  local digests = failed_in(remembered)
  if digests ~= '' then
    return is_among(digests, message)
  end
  return try('HGET', letter, 'message') == message
end
