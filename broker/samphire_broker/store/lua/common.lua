-- common: stands before every other script of this folder, and has what several of them do. It touches only what it is
-- given.
-- A script is not all or nothing: what has been written before a command fails stays. So no script writes before
-- everything that can fail has been tried: types are looked at by reading, rights with `denied`. What may fail without
-- harm (publishing, events, what is remembered of ended tasks, what an attempt leaves) goes through `try`. A claim is the
-- last thing to go, after what becomes of its message: should all of that be wrong, a message is there twice and not lost.
local call, try, match = redis.call, redis.pcall, string.match

-- The error to return where this user lacks a right: commands with arguments that stand for what will be run. Redis
-- before version 7 cannot be asked.
local function denied(commands)
  for _, command in ipairs(redis.acl_check_cmd and commands or {}) do
    if not redis.acl_check_cmd(unpack(command)) then
      return redis.error_reply('NOPERM the user of this connection may not run ' .. command[1] .. ' on ' .. (command[2] or 'the server'))
    end
  end
end

-- As a write that needs no memory, the first one lets the others through when memory is full.
local function begin_to_write(hash)
  call('HDEL', hash, '')
end

-- Where a claim came from: its list, and its model.
local function list_of(field)
  return match(field, '^%d+!?:(.*)$')
end
local function model_of(field)
  return match(field, '^%d+!?:inference%.([^@\6]*)')
end

-- Push a message to a list; beside it where a key of another type lies. Returns where it is, or nil: nowhere.
local function push(how, list, message)
  for _, key in ipairs({list, list .. ':returned'}) do
    if type(try(how, key, message)) == 'number' then
      return key
    end
  end
end

-- Celery's state in a stored result.
local function state_in(meta)
  return type(meta) == 'string' and match(meta, '"status": ?"(%u+)"') or nil
end

-- What is remembered of tasks that have ended, longer than their results: a letter for how (c: cancelled, and what
-- follows from that is not paid yet), the number of the run if it is not the first, and of a failure 16 digits of the
-- SHA-1 of each message that has failed, the last first. It lies in two hashes, of which the older goes when the newer is old enough: each end is remembered
-- for one to two lifetimes.
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

-- The next run of a task whose last one has failed: `settle` finds its number, and the digests of what has failed.
local function open_run(hash, tried, id, run, failed, lifetime_s)
  try('DEL', hash)
  try('HSET', hash, 'run', run)
  if failed ~= '' then
    try('HSET', hash, 'failed', failed)
  end
  try('EXPIRE', hash, lifetime_s)
  try('SADD', tried, id)
  try('EXPIRE', tried, lifetime_s)
end

-- What is kept of an attempt (JSON, "" for nothing), and what it counts as.
local function note_attempt(hash, tried, id, attempt, counts, lifetime_s)
  if attempt ~= '' then
    local history = try('HGET', hash, 'history')
    try('HSET', hash, 'history', type(history) == 'string' and history .. ',' .. attempt or attempt)
  end
  for _, count in ipairs(counts) do
    try('HINCRBY', hash, count, 1)
  end
  try('EXPIRE', hash, lifetime_s)
  try('SADD', tried, id)
  try('EXPIRE', tried, lifetime_s)
end

-- Append to a client's stream, and to no other key.
local function tell(stream, most, lifetime_s, ...)
  if match(stream, '^events:[%w-]+$') then
    try('XADD', stream, 'MAXLEN', '~', most, '*', ...)
    try('EXPIRE', stream, lifetime_s)
  end
end
