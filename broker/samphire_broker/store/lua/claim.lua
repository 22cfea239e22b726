-- claim: move messages from queue lists into a worker's in-flight hash.
-- KEYS  1 worker:<wid>   2 worker:<wid>:inflight   3.. lists, in the order of service
-- ARGV  1 most messages   2 stop after so many bytes   3 largest message that is returned whole
--       4 number of the first claim   5.. how many each list gives before the first gives more
-- Returns field, size, message, field, size, message, …: of a message over ARGV[3] only the last 16 KB,
-- which hold a kombu message's headers.
-- Each message is stored right after it is popped: a script that fails later has lost nothing.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return redis.error_reply('NOLEASE the lease of this worker has lapsed')
end
local left, bytes_left, largest = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local number = tonumber(ARGV[4])
local reply = {}
local function take(key, most)
  while most > 0 and left > 0 and bytes_left > 0 do
    local message = redis.pcall('RPOP', key)
    if type(message) ~= 'string' then -- empty, or a key that is no list
      return
    end
    local field = string.format('%d:%s', number, key)
    redis.call('HSET', KEYS[2], field, message)
    local size = #message
    if size > largest then
      message = string.sub(message, -16384)
    end
    local n = #reply
    reply[n + 1], reply[n + 2], reply[n + 3] = field, size, message
    number, left, most, bytes_left = number + 1, left - 1, most - 1, bytes_left - #message
  end
end
for i = 3, #KEYS do
  take(KEYS[i], tonumber(ARGV[i + 2]))
end
for i = 3, #KEYS do -- what others left unused
  take(KEYS[i], left)
end
return reply
